"""A comparison as a reader sees it: tables of all kinds, the verdict, and curves over L0 and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from atom_lens.dictionaries import kind
from atom_lens.studies.compare.result import Cell, Comparison, Hook
from atom_lens.studies.points import LABELS, SPLITS, Measured, over_l0, over_layers
from atom_lens.studies.study import Part
from atom_lens.studies.train.show import layers_part
from atom_lens.views import table
from atom_lens.views.plot import Panel
from atom_lens.views.table import Row, Table, shown_interval

_LEAST_Q = 0.5
# Controls and nulls do not compete: their encoder is a pursuit, or they are not sparse.
COMPETING = ("ours", "baseline")


def show(result: Comparison, name: str) -> list[Part]:
    """Tables of every hook and over all hooks, and the plots."""
    tables = [_over_hooks(result, name)] if len(result.hooks) > 1 else []
    for hook, found in result.hooks.items():
        tables += [_cells(found, f"{name} · {hook} of {result.model}"), *_matched(found, f"{name} · {hook}")]
        tables += _encoders(found, f"{name} · {hook}")
    measured = {hook: [_measured(cell) for cell in found.cells] for hook, found in result.hooks.items()}
    lines = [
        Panel(
            f"{LABELS[key]} over L0",
            "Held-out, means over seeds; compare dictionaries with each other, and with the nulls, at the same L0.",
            {f"{name}, {hook} of {result.model}": over_l0(here, key) for hook, here in measured.items()},
        )
        for key in ("r2", "r2_aip", "q_star")
    ]
    parts = [Part("Results and nulls", tables), Part("Dictionaries and nulls", panels=lines)]
    if curves := over_layers(measured):
        parts.append(layers_part({f"{name}, {at}": here for at, here in curves.items()}))
    return parts


def _measured(cell: Cell) -> Measured:
    one = kind(cell.kind)
    return Measured(one, one.asked(cell.level), [{"train": run.train, "heldout": run.heldout} for run in cell.runs])


def _cells(found: Hook, title: str) -> Table:
    facts = [
        ("n train", f"{found.n:,}"),
        ("n held-out", f"{found.n_heldout:,}"),
        ("F", f"{found.d_sae:,}"),
        ("n / F", f"{found.n_over_f:.1f}"),
    ]
    note = "Means over seeds, ± half their range; of a single run, the 95% interval of a held-out value over subjects."
    both = {"ours", "baseline"} <= {kind(cell.kind).role for cell in found.cells}
    return _table(title, [[cell] for cell in found.cells], facts, [verdict(found), note] if both else [note])


def _over_hooks(result: Comparison, name: str) -> Table:
    hooks = result.hooks
    note = "Means over hooks and seeds; below a held-out value, the lowest and highest hook if there are several."
    title = f"{name} · mean over {len(hooks)} hooks of {result.model}"
    return _table(title, list(by_kind(hooks).values()), [], [note], len(hooks))


def by_kind(hooks: Mapping[str, Hook]) -> dict[tuple[str, float | None], list[Cell]]:
    """The cells of each kind and level: features are at one hook only, and levels end at the width."""
    found: dict[tuple[str, float | None], list[Cell]] = {}
    for one in hooks.values():
        for cell in one.cells:
            found.setdefault((cell.kind, cell.level), []).append(cell)
    return found


def _table(
    title: str,
    rows: Sequence[Sequence[Cell]],
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    hooks: int = 1,
) -> Table:
    groups = [("", 2), *((label, 2) for label in LABELS.values()), ("L0", 2), ("dead atoms", 2), ("PW-MCC", 3)]
    costly = any(run.loss for cells in rows for cell in cells for run in cell.runs)
    lost = ["CE recovered", "KL"] if costly else []
    heads: list[table.Cell | str] = ["dictionary", "asked"]
    heads += [table.Cell(label, held=split == "heldout") for _ in range(5) for split, label in SPLITS.items()]
    heads += ["", "at start", "> 0.9", *lost]
    shown = [_row(cells, hooks, costly) for cells in rows]
    return Table(title, heads, shown, [*groups, *([("", 2)] if costly else [])], facts, notes)


def _row(cells: Sequence[Cell], hooks: int, costly: bool) -> Row:
    """One kind at one sparsity: its cell, or its cells at those of `hooks` that have it."""
    one, level = kind(cells[0].kind), cells[0].level
    shown: list[table.Cell | str] = ["" if level is None else f"{level:g}"]
    for key in LABELS:
        for split in SPLITS:
            seeds = [[getattr(getattr(run, split), key) for run in cell.runs] for cell in cells]
            mean = np.mean([np.mean(each) for each in seeds])
            small = _spread(cells, seeds, key) if split == "heldout" else ""
            shown.append(table.Cell(f"{mean:.3f}", small, split == "heldout"))
    for pick, digits in ((lambda f: f.l0.mean, 1), (lambda f: f.dead_atoms, 0)):
        for split in SPLITS:
            mean = np.mean([pick(getattr(run, split)) for cell in cells for run in cell.runs])
            shown.append(table.Cell(f"{mean:,.{digits}f}", held=split == "heldout"))
    for key, form in (("pw_mcc", ".3f"), ("pw_mcc_start", ".3f"), ("above_09", ".1%")):
        same = [found for cell in cells if (found := getattr(cell.identity, key, None)) is not None]
        shown.append(f"{np.mean(same):{form}}" if same else "")
    for key in ("recovered", "kl") if costly else ():
        found = [getattr(run.loss, key) for cell in cells for run in cell.runs if run.loss is not None]
        shown.append(f"{np.mean(found):.3f}" if found else "")
    where = "" if len(cells) == hooks else f" ({len(cells)} of {hooks} hooks)"
    return Row(one.label + where, shown, one.role == "null")


def _spread(cells: Sequence[Cell], seeds: Sequence[Sequence[float]], key: str) -> str:
    """The spread of a held-out value: its range over hooks, else over seeds, else its interval over subjects."""
    if len(cells) > 1:
        means = [float(np.mean(each)) for each in seeds]
        return f"{min(means):.3f} to {max(means):.3f}"
    if len(seeds[0]) > 1:
        return f"± {(max(seeds[0]) - min(seeds[0])) / 2:.3f}"
    interval = cells[0].runs[0].heldout.interval
    return shown_interval(interval[key]) if interval else ""


def _matched(found: Hook, title: str) -> list[Table]:
    """A table per L0, best held-out R² first, nulls and controls included."""
    tables = []
    for l0 in dict.fromkeys(row.l0 for row in found.matched):
        here = [row for row in found.matched if row.l0 == l0]
        lost = ["CE recovered"] if any(row.recovered is not None for row in here) else []
        rows = []
        for row in sorted((row for row in here if row.between), key=lambda row: -(row.r2 or 0)):
            low, high = row.between or (0, 0)
            values = [row.r2, row.r2_aip, row.q_star, row.train_r2, row.pw_mcc, *([row.recovered] if lost else [])]
            cells = ["" if one is None else f"{one:.3f}" for one in values]
            one = kind(row.kind)
            rows.append(Row(one.label, [*cells, f"{low:.1f} and {high:.1f}"], one.role == "null"))
        heads = ["held-out", *LABELS.values(), "R² train", "PW-MCC", *lost, "between L0"]
        missing = [kind(r.kind).label for r in here if not r.between and kind(r.kind).role in COMPETING]
        notes = [f"No sweep crosses this L0: {', '.join(missing)}."] if missing else []
        tables.append(Table(f"{title}, at L0 {l0:g}", heads, rows, notes=notes))
    return tables


def _encoders(found: Hook, title: str) -> list[Table]:
    """Atoms under their own encoder, refitted, and under a pursuit, held-out: atoms and encoder told apart."""
    cells = [cell for cell in found.cells if any(run.pursued for run in cell.runs)]
    if not cells:
        return []
    ways = {"heldout": "own encoder", "refit": "own atoms, refit", "pursued": "threshold pursuit, AIP"}
    rows = []
    for cell in cells:
        one, shown = kind(cell.kind), ["" if cell.level is None else f"{cell.level:g}"]
        for way in ways:
            measured = [figures for run in cell.runs if (figures := getattr(run, way)) is not None]
            for key in LABELS:
                mean = np.mean([getattr(figures, key) for figures in measured]) if measured else None
                shown.append("" if mean is None else f"{mean:.3f}")
        rows.append(Row(one.label, shown, one.role == "null"))
    heads = ["dictionary", "asked", *[label for _ in ways for label in LABELS.values()]]
    groups = [("", 2), *((label, len(LABELS)) for label in ways.values())]
    return [Table(f"{title}, held-out, under other encoders", heads, rows, groups)]


class Margin(NamedTuple):
    """How far the best of ours that is as stable lies above a baseline's point; None if none of ours is as stable."""

    kind: str
    level: float | None
    q_star: float
    r2: float
    margin: float | None


def margins(found: Hook) -> list[Margin]:
    """For each point of a trained baseline at q* >= 0.5, the best held-out R² of ours with no smaller q*, less its own.

    Nothing is interpolated. Below q* = 0.5 codes are dense and R² means little: neurons have 1.
    """
    at = {"q_star": 0.0, "r2": 0.0}
    points = []
    for cell in found.cells:
        at = {key: float(np.mean([getattr(run.heldout, key) for run in cell.runs])) for key in at}
        points.append((cell, at["q_star"], at["r2"]))
    ours = [(q, r2) for cell, q, r2 in points if kind(cell.kind).role == "ours"]
    result = []
    for cell, q, r2 in points:
        if kind(cell.kind).role == "baseline" and q >= _LEAST_Q:
            as_stable = [value for other, value in ours if other >= q]
            result.append(Margin(cell.kind, cell.level, q, r2, max(as_stable) - r2 if as_stable else None))
    return result


def verdict(found: Hook) -> str:
    """In a few words: how many baseline points one of ours beats in both R² and q*, and which ones it does not."""
    points = margins(found)
    if not points:
        return f"No baseline reached q* {_LEAST_Q}, so none is compared."
    beaten = [point for point in points if point.margin is not None and point.margin >= 0]
    text = f"Of {len(points)} baseline points with q* >= {_LEAST_Q}, {len(beaten)} lie below one of ours as stable"
    for point in points:
        asked = "" if point.level is None else f" at {point.level:g}"
        name = f"{kind(point.kind).label}{asked} (q* {point.q_star:.3f}, R² {point.r2:.3f})"
        if point.margin is None:
            text += f"; {name} is more stable than any of ours"
        elif point.margin < 0:
            text += f"; {name} is above by {-point.margin:.3f}"
    return text + "."


def runs_table(result: Comparison) -> Table:
    """One row per hook, kind, sparsity, seed and split, for a spreadsheet."""
    heads = ["hook", "kind", "asked", "lr", "run", "split", "n", "r2", "r2_low", "r2_high", "r2_aip", "q_star", "l0"]
    heads += ["l0_p998", "empty_codes", "dead_atoms", "pw_mcc", "above_09"]
    rows = []
    for hook, found in result.hooks.items():
        for cell in found.cells:
            same = ("", "") if cell.identity is None else (cell.identity.pw_mcc, cell.identity.above_09)
            for number, run in enumerate(cell.runs):
                for split, f in (("train", run.train), ("heldout", run.heldout)):
                    low, high = f.interval["r2"] if f.interval else ("", "")
                    values = [
                        cell.kind,
                        "" if cell.level is None else cell.level,
                        "" if cell.lr is None else cell.lr,
                        number,
                    ]
                    values += [split, f.n, f.r2, low, high]
                    values += [f.r2_aip, f.q_star, f.l0.mean, f.l0.p998, f.empty_codes, f.dead_atoms, *same]
                    rows.append(Row(hook, [str(one) for one in values]))
    return Table("", heads, rows)
