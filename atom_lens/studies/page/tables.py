"""Tables as the template sets them, text in cells; and the one that matters most: atoms and nulls of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atom_lens.dictionaries import kind
from atom_lens.studies.page.charts import value_of
from atom_lens.studies.page.folders import Folder
from atom_lens.studies.report_text import reading

FIGURES = {"r2": "R²", "r2_aip": "R² (AIP)", "q_star": "q*"}
SPLITS = ("heldout", "train")


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and smaller below it; held-out ones are tinted."""

    text: str
    small: str = ""
    held: bool = False


# Its head, whether it is of a null, and the other cells.
Row = tuple[str, bool, Sequence[Cell]]


@dataclass(frozen=True)
class Table:
    """A table under a heading.

    Attributes:
        title: of the table; empty for none.
        facts: (name, value) shown above it.
        groups: (heading, columns it spans) above the heads; empty for none.
        heads: of the columns, the first of the row heads.
        rows: of it.
        notes: sentences below it.
    """

    title: str
    heads: Sequence[Cell]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=list)


def headline(folder: Folder, hook: str) -> Table:
    """Atoms and nulls of one hook, held-out and train side by side, with 95% intervals."""
    report = folder.reports[hook]
    groups = [("", 1), *((label, 2) for label in FIGURES.values()), ("L0", 2), ("dead atoms", 2)]
    heads = [Cell("dictionary"), *(Cell("held-out", held=True), Cell("train")) * (len(groups) - 1)]
    rows = [("atoms", False, _split_cells(report, interval))]
    for name, null in report["nulls"].items():
        rows.append((kind(f"null_{name}").label, True, _split_cells(null, _lead)))
    held = report.get("heldout")
    facts = [
        ("model", report.get("model", "")),
        ("n train", f"{report['n']:,}"),
        ("n held-out", f"{held['n']:,}" if held else "none"),
        ("F", f"{report['d_sae']:,}"),
        ("n / F", f"{report['n_over_f']:.2f}"),
    ]
    if same := report.get("identity"):
        start = f" ({same['pw_mcc_start']:.3f} before training)" if same.get("pw_mcc_start") is not None else ""
        facts.append((f"PW-MCC of {same['runs']} seeds", f"{same['pw_mcc']:.3f}{start}"))
    return Table(f"{folder.name} · {hook}", heads, rows, groups, facts, [reading(report)])


def _split_cells(one: Mapping[str, Any], below: Callable[[Mapping[str, Any], str], str]) -> list[Cell]:
    """Held-out and train of every figure, and what is said below it."""
    cells = []
    for key in FIGURES:
        for split in SPLITS:
            found = one.get(split)
            cells.append(
                Cell(f"{value_of(found, key):.4f}", below(found, key), split == "heldout") if found else Cell("–")
            )
    for show in (lambda f: f"{f['l0']['mean']:.2f}", lambda f: f"{f['dead_atoms']:,}"):
        cells += [Cell(show(one[split]) if one.get(split) else "–", held=split == "heldout") for split in SPLITS]
    return cells


def interval(found: Mapping[str, Any], key: str) -> str:
    """The 95% interval of a held-out figure, where there is one."""
    low, high = found.get("interval", {}).get(key, (None, None))
    return "" if low is None else f"{low:.3f} to {high:.3f}"


def _lead(found: Mapping[str, Any], key: str) -> str:
    """The 95% interval of how far the atoms are above a null."""
    low, high = found.get("excess", {}).get(key, {}).get("interval", (None, None))
    return "" if low is None else f"atoms {low:+.3f} to {high:+.3f}"
