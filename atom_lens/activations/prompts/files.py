"""Prompts from files and data sets: lines of text, JSON lines, and what `datasets` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from atom_lens.activations.models import find_model, load_tokenizer
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import parse_json, shown
from atom_lens.storage.schema import Section
from atom_lens.storage.text import existing, lines_in

_FIELDS = ("text", "template", "subject", "answer", "tokens")


class TextFile(Source):
    """One prompt for each non-empty line of a text file, or of all files that `path` (with * and ?) matches."""

    source: Literal["text"] = "text"
    path: str
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list(self.documents())

    @override
    def documents(self) -> Iterator[Prompt]:
        lines = (line for file in _files(self.path) for line in lines_in(file))
        return islice((Prompt(line) for line in lines if line.strip()), self.limit)


class Rows(Section):
    """Rows with `text`, or `template` and `subject`, and perhaps `answer`; `columns` maps these to their own names.

    Rows with a blank text are left out. Tokenised rows have `tokens`: ids of `tokenizer`, named as models are. They are
    decoded, without special tokens, and the model that reads them tokenises the text again; so they may be the ids of
    another model.
    """

    columns: dict[str, str] = {}
    tokenizer: str | None = None
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list(self._prompts(self._rows(streaming=False)))

    def documents(self) -> Iterator[Prompt]:
        return self._prompts(self._rows(streaming=True))

    def _rows(self, streaming: bool) -> Iterable[tuple[str, Any]]:
        """The rows, each with its place for error messages."""
        raise NotImplementedError

    def _prompts(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Prompt]:
        unknown = set(self.columns) - set(_FIELDS)
        if unknown:
            raise AtomLensError(f"columns has {sorted(unknown)}, allowed are {', '.join(_FIELDS)}")
        decode = self._decode()
        made, given, missing = 0, 0, set(self.columns)
        for where, row in rows:
            fields = {name: _reach(row, self.columns.get(name, name)) for name in _FIELDS}
            missing -= {name for name, value in fields.items() if value is not None}
            try:
                prompt = _from_fields(fields, row, decode)
            except ValueError as error:
                raise AtomLensError(f"{where}: {error}") from error
            made += 1
            if prompt is not None:
                given += 1
                yield prompt
            if given == self.limit:
                break
        for name in sorted(missing if made else ()):
            raise AtomLensError(f"columns.{name} is {self.columns[name]!r}, which none of the {made} rows has")

    def _decode(self) -> Callable[[list[int]], str] | None:
        if self.tokenizer is None:
            if "tokens" in self.columns:
                raise AtomLensError("columns has tokens but tokenizer is null, the tokenizer that made them is needed")
            return None
        tokenizer = load_tokenizer(find_model(self.tokenizer))
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class JsonLines(Rows, Source):
    """Files of JSON lines; `path` may match several, with * and ?. Columns as in `Rows`."""

    source: Literal["jsonl"] = "jsonl"
    path: str

    @override
    def _rows(self, streaming: bool) -> Iterable[tuple[str, Any]]:
        return (row for file in _files(self.path) for row in _json_lines(file))


class HubDataset(Rows, Source):
    """A data set on the Hugging Face Hub or on disk, including one that `save_to_disk` wrote. Columns as in `Rows`.

    Dots reach into objects. CounterFact: ``columns={"template": "requested_rewrite.prompt", "subject":
    "requested_rewrite.subject", "answer": "requested_rewrite.target_true.str"}``. Data sets of sae-lens'
    `PretokenizeRunner`: ``columns={"tokens": "input_ids"}`` and the `tokenizer` that it used.
    """

    source: Literal["dataset"] = "dataset"
    path: str
    config: str | None = None
    split: str = "train"

    @override
    def _rows(self, streaming: bool) -> Iterable[tuple[str, Any]]:
        from datasets import load_dataset, load_from_disk

        try:
            if (Path(self.path) / "state.json").is_file():
                rows = load_from_disk(self.path)
            else:
                rows = load_dataset(self.path, self.config, split=self.split, streaming=streaming)
        except Exception as error:
            raise AtomLensError(
                f"the data set {self.path!r} (split {self.split!r}) could not be loaded: {error}"
            ) from error
        return ((f"{self.path} row {number}", row) for number, row in enumerate(rows.with_format(None), 1))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_in(path), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise AtomLensError(f"{where} is not a JSON object: {error}") from error
            yield where, row


def _files(path: str) -> list[Path]:
    """The files that a path matches, in the order of their names.

    Raises:
        AtomLensError: there is none.
    """
    found = [] if Path(path).expanduser().is_file() else sorted(map(Path, glob(str(Path(path).expanduser()))))
    return [file for file in found if file.is_file()] or [existing(path)]


def _from_fields(
    fields: dict[str, Any], row: dict[str, Any], decode: Callable[[list[int]], str] | None
) -> Prompt | None:
    """The prompt of a row; None where its text is blank, as rows of many data sets are."""
    tokens = fields.pop("tokens")
    if decode and not fields["text"] and tokens is not None:
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise AtomLensError(f"tokens is {shown(tokens)}, allowed are whole numbers")
        fields["text"] = decode(tokens)
    for name, value in fields.items():
        if not isinstance(value, str | None):
            raise AtomLensError(f"{name} is {shown(value)}, allowed is text")
    # Some data sets keep the blank before a subject as part of it; the same entity must be the same subject.
    text, template, subject, answer = (value.strip() if value else None for value in fields.values())
    if template and subject:
        return Prompt.fill(template, subject, answer)
    if text:
        return Prompt(text, subject, answer=answer)
    if fields["text"] is not None:
        return None
    raise AtomLensError(f"neither a text, nor tokens, nor a template with a subject, but {shown(sorted(row))}")


def _reach(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return None
        row = row[key]
    return row
