"""Interventions as a reader sees them: swaps, ablations, specificity, a verdict, and plots."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from atom_lens.studies.intervene.result import Cell, Interventions, Mean, Swap
from atom_lens.studies.study import Part
from atom_lens.views import table
from atom_lens.views.plot import QUIET, SERIES, Draw, Panel, plain
from atom_lens.views.table import Row, Table, shown_interval

# Kind of edit -> its label in a table, and in a plot.
EDITS = {
    "patch": ("ceiling: whole activation of B", "ceiling"),
    "swap": ("swap, x + (z_B − z_A) D", "swap"),
    "replace": ("swap and drop the error, decode(z_B)", "swap, no error"),
    "exchange": ("exchange by code, every token", "exchange"),
    "rest": ("what the swap leaves out", "left out"),
    "other": ("null: a third subject's code, same norm", "null: third subject"),
    "random": ("null: random atoms, same norm", "null: random atoms"),
    "none": ("floor: no edit", "no edit"),
}
_MEANS = "difference of class means (told the answers)"


def show(result: Interventions, name: str) -> list[Part]:
    """Tables and plots."""
    title = f"{name} · {result.hook} of {result.model}"
    panels = [
        Panel(heading, caption, {title: draw})
        for heading, caption, draw in (
            (
                "Answers flipped",
                "Facts about held-out subjects, A's code or activation replaced by B's, as described in the table; "
                "bars are 95% intervals.",
                flips(result),
            ),
            ("Dose-response", "The swap at a fraction of its strength, or beyond it.", doses(result)),
            (
                "Ablations",
                "A's strongest atoms set to zero; dotted, the null of as many random atoms.",
                ablations(result),
            ),
        )
    ]
    tables = [_scan(result, title), _swaps(result, title), _ablations(result), _divergences(result)]
    return [Part("Interventions", tables, panels)]


def _scan(result: Interventions, title: str) -> Table:
    rows = [Row(hook, [table.Cell(*_mean(found))]) for hook, found in result.scan.items()]
    return Table(f"{title}: choice of the hook", ["hook", "flips by whole patch, training facts"], rows)


def _swaps(result: Interventions, title: str) -> Table:
    heads = ["edit", "L0", "flips to B", "of the ceiling", "A kept", "log-odds of B over A, nats"]
    bounds = result.cells[0].swap
    rows = [
        Row(EDITS["patch"][0], _swap("", bounds["patch"], None)),
        Row(_MEANS, _swap("", result.class_means, None)),
        Row(EDITS["none"][0], _swap("", bounds["none"], None), null=True),
    ]
    for cell in result.cells:
        l0 = f"{cell.heldout.l0.mean:.1f}"
        for edit, (label, _) in EDITS.items():
            if edit in cell.swap and edit not in ("patch", "none"):
                cells = _swap(l0, cell.swap[edit], cell.of_ceiling.get(edit))
                rows.append(Row(f"{cell.name}: {label}", cells, label.startswith("null")))
        for one in sorted(cell.doses, key=lambda one: one.dose):
            if one.dose == 1:  # the swap itself, and its null
                continue
            label = f"x + {one.dose:g} (z_B − z_A) D"
            rows.append(Row(f"{cell.name}: {label}", _swap(l0, one, one.of_ceiling)))
            if one.null is not None:
                null = f"null: a third subject's code, dose {one.dose:g}"
                rows.append(Row(f"{cell.name}: {null}", _swap(l0, one.null, None), True))
        for edit in ("patch", "swap", "replace"):
            rows.append(Row(f"{cell.name}: {edit}, subjects it was trained on", _swap(l0, cell.train[edit], None)))
    facts = [("facts about held-out subjects", f"{result.n_facts:,}"), ("answers", f"{result.n_answers:,}")]
    return Table(f"{title}: swaps", heads, rows, facts=facts, notes=verdict(result).split("\n"))


def _swap(l0: str, found: Swap, ratio: Mean | None) -> list[table.Cell | str]:
    share = table.Cell("")
    if ratio is not None:
        low, high = ratio.interval
        share = table.Cell(f"{ratio.mean:.0%}", f"{low:.0%} to {high:.0%}")
    return [
        l0,
        table.Cell(*_mean(found.flips)),
        share,
        table.Cell(*_mean(found.kept)),
        table.Cell(*_mean(found.log_odds, 2)),
    ]


def _mean(found: Mean | None, digits: int = 3) -> tuple[str, str]:
    if found is None:
        return "", ""
    return f"{round(found.mean, digits) + 0.0:.{digits}f}", shown_interval(found.interval, digits)


def _ablations(result: Interventions) -> Table:
    rows = []
    for cell in result.cells:
        for one in cell.ablate:
            rank = "null: random atoms for" if one.rank == "random" else f"by {one.rank},"
            cells = [table.Cell(*_mean(one.drop, 2)), table.Cell(*_mean(one.lost))]
            rows.append(Row(f"{cell.name}: {rank} {one.k}", cells, one.rank == "random"))
    return Table("Ablations of A's strongest atoms", ["", "drop of ln p(A)", "answers lost"], rows)


def _divergences(result: Interventions) -> Table:
    edits = list(dict.fromkeys(edit for cell in result.cells for found in cell.kl.values() for edit in found))
    rows = [
        Row(f"{cell.name}: {where.replace('_', ' ')}", [table.Cell(*_mean(found.get(edit), 4)) for edit in edits])
        for cell in result.cells
        for where, found in cell.kl.items()
    ]
    notes = [
        f"{cell.name}: log-odds rise at every dose up to 1 for {cell.monotone.mean:.0%} of the facts."
        for cell in result.cells
        if cell.monotone
    ]
    return Table("KL of the next token elsewhere, nats", ["", *edits], rows, notes=notes)


def verdict(result: Interventions) -> str:
    """What a reader wants to know first: how much of the ceiling swaps and nulls reach, and at what cost elsewhere."""
    lines = []
    for cell in result.cells:
        reached = {name: ratio.mean for name, ratio in cell.of_ceiling.items() if ratio}
        if not reached:
            lines.append(f"{cell.name}: the ceiling is zero, so nothing can be said.")
            continue
        rises = {name: cell.swap[name].log_odds.mean for name in ("swap", "random", "other")}
        lines.append(
            f"{cell.name} (K {cell.heldout.l0.mean:.1f}, q* {cell.heldout.q_star:.3f}): swaps reach "
            f"{reached['swap']:.0%} of the ceiling's flips, {reached['replace']:.0%} without the error term, "
            f"{reached['exchange']:.0%} by code alone; log-odds of B over A rise by {rises['swap']:.2f} nats, with "
            f"random atoms of the same norm {rises['random']:.2f}, with a third subject's code {rises['other']:.2f}; "
            f"KL on unrelated text {cell.kl['unrelated']['exchange'].mean:.4f}."
        )
    return "\n".join(lines)


def flips(result: Interventions) -> Draw:
    """Share of answers flipped to B's, by kind of edit and dictionary, with 95% intervals; the ceiling as a line."""

    def draw(axes: Axes) -> None:
        names = [label for _, label in EDITS.values()]
        first = result.cells[0].swap
        axes.axvline(first["patch"].flips.mean, color=QUIET, linestyle="--", linewidth=1, label="ceiling")
        axes.axvline(result.class_means.flips.mean, color=QUIET, linestyle=":", linewidth=1, label="class means")
        for number, cell in enumerate(result.cells):
            shift = 0.7 * (number - (len(result.cells) - 1) / 2) / max(len(result.cells), 1)
            at = [list(EDITS).index(edit) + shift for edit in cell.swap]
            found = [one.flips for one in cell.swap.values()]
            _bars(axes, [one.mean for one in found], at, found, SERIES[number % len(SERIES)], cell, across=True)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="share of answers flipped to B's", xlim=(-0.03, None))

    return draw


def doses(result: Interventions) -> Draw:
    """Share of answers flipped to B's by the dose of the swap, with its null; the ceiling as a line."""

    def draw(axes: Axes) -> None:
        first = result.cells[0].swap
        axes.axhline(first["patch"].flips.mean, color=QUIET, linestyle="--", linewidth=1, label="ceiling")
        for number, cell in enumerate(result.cells):
            found = sorted(cell.doses, key=lambda one: one.dose)
            x, y = [one.dose for one in found], [one.flips.mean for one in found]
            color = SERIES[number % len(SERIES)]
            axes.plot([0.0, *x], [first["none"].flips.mean, *y], color=color, linewidth=1.2)
            _bars(axes, x, y, [one.flips for one in found], color, cell)
            nulls = [(one.dose, one.null.flips.mean) for one in found if one.null is not None]
            if nulls:
                label = plain(f"{cell.name}, null: third subject")
                axes.plot(*zip(*nulls, strict=True), "x:", color=color, label=label)
        axes.set(xlabel="dose of the swap", ylabel="share of answers flipped to B's", ylim=(-0.03, None))

    return draw


def ablations(result: Interventions) -> Draw:
    """Drop of ln p(A) when A's k strongest atoms are ablated, by attribution, by activation, and at random."""

    def draw(axes: Axes) -> None:
        for number, cell in enumerate(result.cells):
            color = SERIES[number % len(SERIES)]
            for rank, style in (("attribution", "o-"), ("activation", "o--"), ("random", "x:")):
                found = [one for one in cell.ablate if one.rank == rank]
                label = plain(f"{cell.name}, {'null: ' * (rank == 'random')}{rank}")
                axes.plot([o.k for o in found], [o.drop.mean for o in found], style, color=color, label=label)
        ks = sorted({one.k for cell in result.cells for one in cell.ablate})
        axes.set(xscale="log", xlabel="atoms ablated", ylabel="drop of ln p(A), nats")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()

    return draw


def _bars(
    axes: Axes,
    x: list[float],
    y: list[float],
    found: list[Mean],
    color: str,
    cell: Cell,
    across: bool = False,
) -> None:
    """Markers with their 95% intervals, horizontal (`across`) or vertical."""
    spread = [
        [max(0.0, one.mean - one.interval[0]) for one in found],
        [max(0.0, one.interval[1] - one.mean) for one in found],
    ]
    look: dict[str, Any] = {"xerr" if across else "yerr": spread, "color": color, "markersize": 5, "elinewidth": 1}
    axes.errorbar(x, y, fmt="o", label=plain(cell.name), **look)
