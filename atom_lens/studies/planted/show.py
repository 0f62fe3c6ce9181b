"""Planted atoms as a reader sees them."""

from __future__ import annotations

from matplotlib.axes import Axes

from atom_lens.dictionaries import kind
from atom_lens.studies.planted.result import Mark, PlantedFound
from atom_lens.studies.study import Part
from atom_lens.views.plot import ATOMS, Panel
from atom_lens.views.table import Row, Table

_ENCODERS = {"own": "own", "refit": "own atoms, refit", "fixed": "pursuit, fixed K", "threshold": "pursuit, threshold"}


def _row(label: str, mark: Mark, above: bool) -> Row:
    numbers = [mark.mcc, mark.f1, mark.exact]
    r2 = [f"{mark.r2:.3f}" + "^" * above, f"{mark.r2_aip:.3f}"]
    return Row(label, [_ENCODERS[mark.encoder], *(f"{one:.3f}" for one in numbers), f"{mark.l0:.2f}", *r2])


def show(result: PlantedFound, name: str) -> list[Part]:
    """Tables of the theorem, its decay and what was learned; plots of the decay."""
    theorem = result.theorem
    low, high = theorem.window
    facts = [
        ("dictionaries", f"{theorem.dictionaries}"),
        ("codes each way", f"{theorem.dictionaries * theorem.codes:,}"),
        ("window", f"{low:.4f} to {high:.4f}"),
    ]
    wrong = [Row(where, [f"{count:,}"]) for where, count in theorem.wrong.items()]
    tables = [Table(f"{name}: the theorem", ["threshold", "wrong codes"], wrong, facts=facts)]
    for what, levels in result.decay.items():
        rows = [Row(f"{one.level:g}", [f"{one.window:.3f}", f"{one.exact:.4f}"]) for one in levels]
        tables.append(Table(f"{name}: decay with {what}", [what, "window is open by", "codes read exactly"], rows))
    for setting, found in result.learning.items():
        ceiling = next(one for one in found.truth if one.encoder == "threshold")
        rows = [_row("planted atoms", one, False) for one in found.truth]
        rows += [_row(kind(one.kind).label, one, one.above(ceiling)) for one in found.marks]
        heads = ["dictionary", "encoder", "MCC (AIP)", "support F1", "codes exact", "L0", "R²", "R² (AIP)"]
        facts = [("planted L0", f"{found.l0:.2f}"), ("window is open by", f"{found.window:.3f}")]
        notes = []
        if any(one.above(ceiling) for one in found.marks):
            notes.append("^ explains more than the planted atoms under the same pursuit, so it fits the noise.")
        tables.append(Table(f"{name}: {setting}, against the truth", heads, rows, facts=facts, notes=notes))

    def draw(axes: Axes, what: str) -> None:
        levels = result.decay[what]
        axes.plot([one.level for one in levels], [one.exact for one in levels], "o-", color=ATOMS)
        axes.set(xlabel=what, ylabel="codes read exactly", ylim=(-0.03, 1.05))

    panels = [
        Panel(
            f"Decay with {what}",
            "Share of codes that the theorem's TSAE reads exactly, its threshold in mid-window.",
            {name: lambda axes, what=what: draw(axes, what)},
        )
        for what in result.decay
    ]
    return [Part("Planted atoms", tables, panels)]
