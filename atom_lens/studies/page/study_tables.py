"""Tables of studies: units side by side, the law of the capacity, and what edits do to answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from atom_lens.dictionaries import kind
from atom_lens.studies.frontier import verdict
from atom_lens.studies.intervene_figures import verdict as edits_verdict
from atom_lens.studies.layers import by_unit, of_hooks
from atom_lens.studies.page.charts import value_of
from atom_lens.studies.page.folders import Folder
from atom_lens.studies.page.study_charts import KINDS
from atom_lens.studies.page.tables import FIGURES, SPLITS, Cell, Row, Table, interval


def units(folder: Folder, hook: str) -> Table:
    """A comparison's units at one hook: means over seeds."""
    found = folder.studies["compare"]["hooks"][hook]
    facts = [
        ("model", folder.studies["compare"]["model"]),
        ("n train", f"{found['n']:,}"),
        ("n held-out", f"{found['n_heldout']:,}"),
        ("F", f"{found['d_sae']:,}"),
        ("n / F", f"{found['n_over_f']:.1f}"),
    ]
    note = "Means over seeds, ± half their range; of a single run, the 95% interval of a held-out figure over subjects."
    return _unit_table(f"{folder.name} · {hook}", [[cell] for cell in found["cells"]], facts, [verdict(found), note])


def over_hooks(folder: Folder) -> Table:
    """Means over the hooks of a comparison, with the range between them."""
    hooks = folder.studies["compare"]["hooks"]
    cells = [list(found.values()) for found in by_unit(hooks).values()]
    facts = [("model", folder.studies["compare"]["model"]), ("hooks", f"{len(hooks)}")]
    note = "Means over hooks and seeds; below a held-out figure, the lowest and highest hook where there are several."
    return _unit_table(f"{folder.name} · mean over {len(hooks)} hooks", cells, facts, [note], len(hooks))


def _unit_table(
    title: str,
    rows: Sequence[Sequence[Mapping[str, Any]]],
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    hooks: int = 1,
) -> Table:
    groups = [("", 2), *((label, 2) for label in FIGURES.values()), ("L0", 2), ("dead atoms", 2), ("", 2)]
    heads = [Cell("unit"), Cell("asked"), *(Cell("held-out", held=True), Cell("train")) * 5, Cell("PW-MCC")]
    heads.append(Cell("at start"))
    return Table(title, heads, [_unit_row(cells, hooks) for cells in rows], groups, facts, notes)


def _unit_row(cells: Sequence[Mapping[str, Any]], hooks: int) -> Row:
    """One unit at one sparsity: a cell of a comparison, or its cells at those of `hooks` where it is."""
    one, level = kind(cells[0]["unit"]), cells[0]["level"]
    shown = [Cell("" if level is None else f"{level:g}")]
    for key in FIGURES:
        for split in SPLITS:
            seeds = [[value_of(run[split], key) for run in cell["runs"]] for cell in cells]
            small = _spread(cells, seeds, key) if split == "heldout" else ""
            shown.append(Cell(f"{np.mean([np.mean(each) for each in seeds]):.3f}", small, split == "heldout"))
    for pick, digits in ((lambda f: f["l0"]["mean"], 1), (lambda f: f["dead_atoms"], 0)):
        for split in SPLITS:
            mean = np.mean([pick(run[split]) for cell in cells for run in cell["runs"]])
            shown.append(Cell(f"{mean:,.{digits}f}", held=split == "heldout"))
    for key in ("pw_mcc", "pw_mcc_start"):
        same = [cell["identity"][key] for cell in cells if (cell["identity"] or {}).get(key) is not None]
        shown.append(Cell(f"{np.mean(same):.3f}" if same else ""))
    return one.label + of_hooks(len(cells), hooks), one.role == "null", shown


def _spread(cells: Sequence[Mapping[str, Any]], seeds: Sequence[Sequence[float]], key: str) -> str:
    """Of a held-out figure: the range over hooks, else over seeds, else its interval over subjects."""
    if len(cells) > 1:
        means = [float(np.mean(each)) for each in seeds]
        return f"{min(means):.3f} to {max(means):.3f}"
    if len(seeds[0]) > 1:
        return f"± {(max(seeds[0]) - min(seeds[0])) / 2:.3f}"
    return interval(cells[0]["runs"][0]["heldout"], key)


def matched(folder: Folder, hook: str) -> Table:
    """Held-out figures of every unit at the same L0, between two points of its sweep; best R² first."""
    rows = [row for row in folder.studies["compare"]["hooks"][hook]["matched"] if row["between"]]
    names = ("unit", "at L0", "R² held-out", "R² (AIP) held-out", "q* held-out", "R² train", "PW-MCC", "between L0")
    shown = []
    for row in sorted(rows, key=lambda row: (row["l0"], -row["r2"])):
        low, high = row["between"]
        cells = [Cell(f"{row[key]:.3f}" if key in row else "", held=key in FIGURES) for key in _MATCHED]
        cells = [Cell(f"{row['l0']:g}"), *cells, Cell(f"{low:.1f} and {high:.1f}")]
        one = kind(row["unit"])
        shown.append((one.label, one.role == "null", cells))
    note = "Linear in log L0 between the two points of a unit's sweep; a unit without two such points is left out."
    return Table(f"{folder.name} · {hook}, at the same L0", [Cell(name) for name in names], shown, notes=[note])


_MATCHED = (*FIGURES, "train_r2", "pw_mcc")


def laws(folder: Folder, hook: str) -> Table:
    """The critical capacity F_c(n) = factor n^exponent, for each level of R², split and kind of data."""
    heads = [
        Cell(text) for text in ("data", "split", "R² reached", "crossings seen", "exponent", "95% interval", "factor")
    ]
    rows = []
    for law in folder.studies["scale"]["hooks"][hook]["laws"]:
        none = law["exponent"] is None
        low, high = law["exponent_interval"] or (0.0, 0.0)
        cells = [
            Cell(law["split"].replace("heldout", "held-out"), held=law["split"] == "heldout"),
            Cell(f"{law['level']:g}"),
            Cell(f"{len(law['points'])}" + (f" of {law['of']}" if "of" in law else "")),
            Cell("–" if none else f"{law['exponent']:.2f}"),
            Cell("–" if none else f"{low:.2f} to {high:.2f}"),
            Cell("–" if none else f"{law['factor']:.3g}"),
        ]
        rows.append((law["data"], law["data"] == "shuffled", cells))
    note = "A crossing is seen at an n where mean R² passes the level inside the grid; a law needs three of them."
    return Table(f"{folder.name} · {hook}", heads, rows, notes=[note])


def swaps(folder: Folder) -> Table:
    """What edits do to answers about held-out subjects, of each dictionary, with 95% intervals."""
    result = folder.studies["intervene"]
    heads = [
        Cell(text) for text in ("edit", "L0", "flips to B", "of the ceiling", "A kept", "log-odds of B over A, nats")
    ]
    bounds = result["cells"][0]["swap"]
    rows = [
        (KINDS["patch"], False, _swap("", bounds["patch"], None)),
        ("difference of class means (told the answers)", False, _swap("", result["class_means"], None)),
        (KINDS["none"], True, _swap("", bounds["none"], None)),
    ]
    for cell in result["cells"]:
        for edit, label in KINDS.items():
            if edit in cell["swap"] and edit not in ("patch", "none"):
                figures = _swap(
                    f"{cell['heldout']['l0']['mean']:.1f}", cell["swap"][edit], cell["of_ceiling"].get(edit)
                )
                rows.append((f"{cell['name']}: {label}", label.startswith("null"), figures))
    facts = [
        ("model", result["model"]),
        ("hook", result["hook"]),
        ("facts about held-out subjects", f"{result['n_facts']:,}"),
        ("answers", f"{result['n_answers']:,}"),
    ]
    return Table(folder.name, heads, rows, facts=facts, notes=edits_verdict(result).split("\n"))


def _swap(l0: str, found: Mapping[str, Any], ratio: Mapping[str, Any] | None) -> list[Cell]:
    share = Cell("")
    if ratio is not None:
        low, high = ratio["interval"]
        share = Cell(f"{ratio['mean']:.0%}", f"{low:.0%} to {high:.0%}")
    return [
        Cell(l0),
        Cell(*_mean(found["flips"])),
        share,
        Cell(*_mean(found["kept"])),
        Cell(*_mean(found["log_odds"], 2)),
    ]


def _mean(found: Mapping[str, Any], digits: int = 3) -> tuple[str, str]:
    # Adding 0 takes the sign from a rounded -0.
    mean, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in (found["mean"], *found["interval"]))
    return mean, f"{low} to {high}"
