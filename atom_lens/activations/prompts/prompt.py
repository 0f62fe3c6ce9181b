"""A prompt: a text that a model reads and, if there are any, the subject in it and the true answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import shown


@dataclass(frozen=True)
class Prompt:
    """A text and, if there is one, the subject in it.

    Attributes:
        text: what the model reads.
        subject: the entity the prompt is about; it must occur in `text` unless `span` says where it is.
        span: character range [start, end) of the subject; found from `subject` (its first occurrence) if None.
        answer: the true continuation, if it is known.
        document: what the text is a part of, if anything.
    """

    text: str
    subject: str | None = None
    span: tuple[int, int] | None = None
    answer: str | None = None
    document: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise AtomLensError("a prompt is empty")
        for text in (self.text, self.answer or ""):
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can hold one; tokenizers and files in UTF-8 cannot
                raise AtomLensError(f"a prompt has {shown(text)!r}, half a surrogate pair, which is not text") from None
        if self.span is not None:
            start, end = self.span
            if not 0 <= start < end <= len(self.text):
                raise AtomLensError(f"span {self.span} is not inside the prompt {shown(self.text)!r}")
        elif self.subject is not None:
            start = self.text.find(self.subject) if self.subject else -1
            if start < 0:
                raise AtomLensError(f"subject {shown(self.subject)!r} is not in the prompt {shown(self.text)!r}")
            object.__setattr__(self, "span", (start, start + len(self.subject)))

    @property
    def group(self) -> str:
        """What must not be on both sides of a split: the document or the subject, else the whole text."""
        return self.document or self.subject or (self.text[slice(*self.span)] if self.span else self.text)

    @classmethod
    def fill(cls, template: str, subject: str, answer: str | None = None) -> Prompt:
        """A prompt from a template with one ``{}`` for the subject."""
        if template.count("{}") != 1:
            raise AtomLensError(f"template {shown(template)!r} must contain {{}} exactly once")
        start = template.index("{}")
        return cls(template.replace("{}", subject), subject, (start, start + len(subject)), answer)


def as_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """A list of prompts; bare strings become prompts without a subject."""
    made = [Prompt(p) if isinstance(p, str) else p for p in prompts]
    if not made:
        raise AtomLensError("there are no prompts")
    return made
