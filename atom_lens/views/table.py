"""One kind of table: as text for a terminal, as CSV for a spreadsheet, and for the page's template."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len

from atom_lens.storage.files import visible


class Cell(NamedTuple):
    """The text of a cell, and smaller text below it; held-out cells are tinted on the page."""

    text: str
    small: str = ""
    held: bool = False


class Row(NamedTuple):
    """A row: its head, its other cells, and whether it belongs to a null."""

    head: str
    cells: Sequence[Cell | str]
    null: bool = False


@dataclass(frozen=True)
class Table:
    """A table under a heading.

    Attributes:
        title: of the table; empty for none.
        heads: of the columns, the first one above the row heads.
        rows: of the table.
        groups: (heading, number of columns) above the heads; empty for none.
        facts: (name, value) pairs shown above it.
        notes: sentences below it.
    """

    title: str
    heads: Sequence[Cell | str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The table with its title, facts and notes as plain text."""
        lines = [[_of(cell).text for cell in self.heads]]
        if self.groups:
            lines.insert(0, [part for label, span in self.groups for part in (label, *[""] * (span - 1))])
        heads = len(lines)
        for row in self.rows:
            cells = [_of(cell) for cell in row.cells]
            lines.append([row.head, *(cell.text for cell in cells)])
            if any(cell.small for cell in cells):
                lines.append(["", *(cell.small for cell in cells)])
        facts = ", ".join(f"{name} {value}" for name, value in self.facts)
        body = aligned(lines, heads) if self.rows else ""
        return "\n\n".join(filter(None, [self.title, facts, body, *self.notes]))

    def csv(self) -> str:
        """Heads and cells, a line per row."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.grid())
        return out.getvalue()

    def grid(self) -> list[list[str]]:
        """The texts of the heads, then those of each row."""
        rows = [[row.head, *(_of(cell).text for cell in row.cells)] for row in self.rows]
        return [[_of(cell).text for cell in self.heads], *rows]


def _of(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def aligned(cells: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Aligned lines: the first column to the left, the others to the right, a rule under the first `heads` rows.

    Wide characters, such as Chinese ones, count as two.
    """
    shown = [[visible(cell) for cell in row] for row in cells]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        first, *others = zip(row, blanks, strict=True)
        lines.append("  ".join([first[0] + first[1], *(blank + cell for cell, blank in others)]).rstrip())
    lines.insert(heads, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def shown_interval(interval: Sequence[float] | None, digits: int = 3, sign: str = "") -> str:
    """An interval as text, empty for None."""
    if interval is None:
        return ""
    low, high = (
        f"{round(value, digits) + 0.0:{sign}.{digits}f}" for value in interval
    )  # + 0.0: no sign on a rounded -0
    return f"{low} to {high}"
