"""Text that every Python ships: its language reference, and the functions of its standard library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.prompts.source import Source

_LONGEST = 1200  # characters of a function


class PythonDocs(Source):
    """Paragraphs of the Python language reference: English text without a download."""

    source: Literal["python_docs"] = "python_docs"
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        from pydoc_data.topics import topics

        paragraphs = (
            " ".join(paragraph.split())
            for name in sorted(topics)
            for paragraph in topics[name].split("\n\n")
            if len(paragraph.split()) >= 12
        )
        return [Prompt(text) for text in list(dict.fromkeys(paragraphs))[: self.limit]]


class PythonCode(Source):
    """Functions and classes of the standard library, cut at 1,200 characters."""

    source: Literal["python_code"] = "python_code"
    limit: int | None = Field(None, ge=1)

    def read(self) -> list[Prompt]:
        return list({prompt.text: prompt for prompt in islice(_functions(), self.limit)}.values())


def _functions() -> Iterator[Prompt]:
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        code = file.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(code).body:
            text = ast.get_source_segment(code, node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and len(text) > 80:
                yield Prompt(text[:_LONGEST])
