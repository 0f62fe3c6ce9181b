"""Prompts from files and data sets: lines of text, JSON lines, and what `datasets` loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import parse_json, shown
from atom_lens.storage.text import existing, lines_in

_FIELDS = ("text", "template", "subject", "answer")


class TextFile(Source):
    """One prompt for each non-empty line of a text file, or of all files that `path` (with * and ?) stands for."""

    source: Literal["text"] = "text"
    path: str
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list(self.documents())

    @override
    def documents(self) -> Iterator[Prompt]:
        lines = (line for file in _files(self.path) for line in lines_in(file))
        return islice((Prompt(line) for line in lines if line.strip()), self.limit)


class JsonLines(Source):
    """JSON lines with `text` or `template`, `subject`, `answer`; `columns` says how the files call them.

    `path` may stand for several files, with * and ?.
    """

    source: Literal["jsonl"] = "jsonl"
    path: str
    columns: dict[str, str] = {}
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list(self.documents())

    @override
    def documents(self) -> Iterator[Prompt]:
        rows = (row for file in _files(self.path) for row in _json_lines(file))
        return _from_rows(rows, self.columns, self.limit)


class HubDataset(Source):
    """A data set on the Hugging Face Hub, or a local one; `columns` as in `JsonLines`, dots reach into objects.

    CounterFact: ``columns={"template": "requested_rewrite.prompt", "subject": "requested_rewrite.subject",
    "answer": "requested_rewrite.target_true.str"}``.
    """

    source: Literal["dataset"] = "dataset"
    path: str
    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list(self._rows(streaming=False))

    @override
    def documents(self) -> Iterator[Prompt]:
        return self._rows(streaming=True)

    def _rows(self, streaming: bool) -> Iterator[Prompt]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.path, self.config, split=self.split, streaming=streaming)
        except Exception as error:
            raise AtomLensError(
                f"the data set {self.path!r} (split {self.split!r}) could not be loaded: {error}"
            ) from error
        numbered = ((f"{self.path} row {number}", row) for number, row in enumerate(rows, 1))
        return _from_rows(numbered, self.columns, self.limit)


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
    """The files that a path stands for, in the order of their names.

    Raises:
        AtomLensError: there is none.
    """
    found = [] if Path(path).expanduser().is_file() else sorted(map(Path, glob(str(Path(path).expanduser()))))
    return [file for file in found if file.is_file()] or [existing(path)]


def _from_rows(rows: Iterable[tuple[str, Any]], columns: dict[str, str], limit: int | None) -> Iterator[Prompt]:
    """Prompts of `rows`, each with where it stands."""
    unknown = set(columns) - set(_FIELDS)
    if unknown:
        raise AtomLensError(f"columns has {sorted(unknown)}, allowed are {', '.join(_FIELDS)}")
    made, missing = 0, set(columns)
    for where, row in islice(rows, limit):
        fields = {name: _reach(row, columns.get(name, name)) for name in _FIELDS}
        try:
            prompt = _from_fields(fields, row)
        except ValueError as error:
            raise AtomLensError(f"{where}: {error}") from error
        made += 1
        missing -= {name for name, value in fields.items() if value is not None}
        yield prompt
    for name in sorted(missing if made else ()):
        raise AtomLensError(f"columns.{name} is {columns[name]!r}, which none of the {made} rows has")


def _from_fields(fields: dict[str, Any], row: dict[str, Any]) -> Prompt:
    for name, value in fields.items():
        if not isinstance(value, str | None):
            raise AtomLensError(f"{name} is {shown(value)}, allowed is text")
    # Some data sets keep the blank before a subject with it; the same entity must be the same subject.
    text, template, subject, answer = (value.strip() if value else None for value in fields.values())
    if template and subject:
        return Prompt.fill(template, subject, answer)
    if text:
        return Prompt(text, subject, answer=answer)
    raise AtomLensError(f"neither a text nor a template with a subject, but {shown(sorted(row))}")


def _reach(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return None
        row = row[key]
    return row
