"""Planted atoms as a reader sees them."""

from __future__ import annotations

from matplotlib.axes import Axes

from atom_lens.dictionaries import kind
from atom_lens.studies.planted.result import PlantedFound
from atom_lens.studies.study import Part
from atom_lens.views.plot import ATOMS, Panel
from atom_lens.views.table import Row, Table


def show(result: PlantedFound, name: str) -> list[Part]:
    """Tables of the theorem, its decay and what was learned; the decay as pictures."""
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
    if result.learning:
        rows = [
            Row(kind(one.unit).label, [f"{one.mcc:.3f}", f"{one.f1:.3f}", f"{one.exact:.3f}", f"{one.l0:.2f}"])
            for one in result.learning
        ]
        heads = ["trained", "MCC (AIP)", "support F1", "codes exact", "L0"]
        tables.append(Table(f"{name}: trained dictionaries against the truth", heads, rows))

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
