"""Prompts from files and data sets: lines of text, JSON lines, and what `datasets` loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import parse_json, shown
from atom_lens.storage.text import existing, lines_of, read_text

_FIELDS = ("text", "template", "subject", "answer")


class TextFile(Source):
    """One prompt for each non-empty line of a text file."""

    source: Literal["text"] = "text"
    path: str
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        lines = lines_of(read_text(existing(self.path)))
        return [Prompt(line) for line in lines if line.strip()][: self.limit]


class JsonLines(Source):
    """JSON lines with `text` or `template`, `subject`, `answer`; `columns` says how the file calls them."""

    source: Literal["jsonl"] = "jsonl"
    path: str
    columns: dict[str, str] = {}
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return _from_rows(_json_lines(existing(self.path)), self.columns, self.limit)


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
        from datasets import load_dataset

        try:
            rows = load_dataset(self.path, self.config, split=self.split)
        except Exception as error:
            raise AtomLensError(
                f"the data set {self.path!r} (split {self.split!r}) could not be loaded: {error}"
            ) from error
        numbered = ((f"{self.path} row {number}", row) for number, row in enumerate(rows, 1))
        return _from_rows(numbered, self.columns, self.limit)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                raise AtomLensError(f"{where} is not a JSON object: {error}") from error
            yield where, row


def _from_rows(rows: Iterable[tuple[str, Any]], columns: dict[str, str], limit: int | None) -> list[Prompt]:
    """Prompts of `rows`, each with where it stands."""
    unknown = set(columns) - set(_FIELDS)
    if unknown:
        raise AtomLensError(f"columns has {sorted(unknown)}, allowed are {', '.join(_FIELDS)}")
    made: list[Prompt] = []
    missing = set(columns)
    for where, row in islice(rows, limit):
        fields = {name: _reach(row, columns.get(name, name)) for name in _FIELDS}
        try:
            made.append(_from_fields(fields, row))
        except ValueError as error:
            raise AtomLensError(f"{where}: {error}") from error
        missing -= {name for name, value in fields.items() if value is not None}
    for name in sorted(missing if made else ()):
        raise AtomLensError(f"columns.{name} is {columns[name]!r}, which none of the {len(made)} rows has")
    return made


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
