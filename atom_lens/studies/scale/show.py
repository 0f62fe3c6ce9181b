"""The grid as a reader sees it: R² at every n and F, the laws, the cliff and the critical capacity."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from atom_lens.studies.scale.result import Cell, Grid, Law, Scaling
from atom_lens.studies.study import Part
from atom_lens.views import table
from atom_lens.views.plot import QUIET, SERIES, Draw, Panel, log_ticks, r2_axis
from atom_lens.views.table import Row, Table, shown_interval

# Tables of the grid: title, data, the value of a cell (None if it has none), and label and value of the small print.
_Value = Callable[[Cell], float | None]
_GRIDS: list[tuple[str, str, _Value, str, _Value]] = [
    (
        f"{'shuffled, ' * (data == 'shuffled')}R² {label}",
        data,
        lambda cell, split=split: cell.mean(split, "r2"),
        "q*",
        lambda cell, split=split: cell.mean(split, "q_star"),
    )
    for data in ("activations", "shuffled")
    for label, split in (("held-out", "heldout"), ("train", "train"))
]
_GRIDS += [
    (
        "R² (AIP) held-out",
        "activations",
        lambda cell: cell.mean("heldout", "r2_aip"),
        "PW-MCC",
        lambda cell: cell.identity and cell.identity.pw_mcc,
    ),
    (
        "cross-entropy recovered",
        "activations",
        lambda cell: _loss(cell, "recovered"),
        "KL",
        lambda cell: _loss(cell, "kl"),
    ),
]


def _loss(cell: Cell, key: str) -> float | None:
    found = [getattr(run.loss, key) for run in cell.runs if run.loss is not None]
    return sum(found) / len(found) if found else None


def show(result: Scaling, name: str) -> list[Part]:
    """Tables and plots of every hook."""
    tables, held, train, critical = [], {}, {}, {}
    for hook, grid in result.hooks.items():
        title = f"{name} · {hook} of {result.model}"
        tables += [*_grids(grid, title), _laws(grid, title), *_growth(grid, title)]
        held[title], train[title] = cliff(grid, "heldout"), cliff(grid, "train")
        if any(law.points for law in grid.laws):
            critical[title] = law_plot(grid)
    caption = "Means over seeds with their range; dotted: the null of shuffled coordinates; thin vertical lines: F = n."
    panels = [
        Panel("R² over capacity, held-out", caption, held),
        Panel("R² over capacity, train", caption, train),
        Panel(
            "Critical capacity",
            "The F at which mean R² passes a level, over n, and the power law through it; squares: the shuffled null.",
            critical,
        ),
    ]
    return [Part("Capacity", tables, panels)]


def _grids(grid: Grid, title: str) -> list[Table]:
    capacities = sorted({cell.capacity for cell in grid.cells})
    tables = []
    for label, data, value, below, small in _GRIDS:
        cells = [cell for cell in grid.cells if cell.data == data and value(cell) is not None]
        rows = []
        for n in sorted({cell.n for cell in cells}):
            at = {cell.capacity: cell for cell in cells if cell.n == n}
            shown = [
                table.Cell(f"{value(at[f]):.3f}", "" if small(at[f]) is None else f"{below} {small(at[f]):.3f}")
                for f in capacities
            ]
            rows.append(Row(f"n = {n:,}", shown, data == "shuffled"))
        if rows:
            tables.append(Table(f"{title}: {label}", ["", *(f"F = {f:,}" for f in capacities)], rows))
    return tables


def _laws(grid: Grid, title: str) -> Table:
    heads = ["data", "split", "R² reached", "crossings seen", "exponent", "95% interval", "factor"]
    rows = []
    for law in grid.laws:
        cells = [law.split.replace("heldout", "held-out"), f"{law.level:g}", f"{len(law.points)} of {law.of}"]
        cells.append("–" if law.exponent is None else f"{law.exponent:.2f}")
        cells.append(shown_interval(law.exponent_interval, 2) or "–")
        cells.append("–" if law.factor is None else f"{law.factor:.3g}")
        rows.append(Row(law.data, cells, law.data == "shuffled"))
    note = "A crossing is seen at an n if mean R² passes the level inside the grid; a law needs three of them."
    return Table(f"{title}: critical capacity F_c(n) = factor n^exponent", heads, rows, notes=[note])


def _growth(grid: Grid, title: str) -> list[Table]:
    rows = [
        Row(
            one.data,
            [
                f"{one.capacity:,}",
                {"r2": "R²", "r2_aip": "R² (AIP)"}[one.key],
                f"{one.limit:.3f}",
                f"{one.factor:.3g}",
                f"{one.exponent:.2f}",
                f"{min(one.n):,} to {max(one.n):,}",
            ],
            one.data == "shuffled",
        )
        for one in grid.growth
        if one.limit is not None
    ]
    heads = ["data", "F", "", "limit", "factor", "exponent", "n"]
    return [Table(f"{title}: held-out R² over n, limit - factor n^-exponent", heads, rows)] if rows else []


def cliff(grid: Grid, split: str) -> Draw:
    """R² over F on one split, a line for each n; the shuffled null dotted."""

    def draw(axes: Axes) -> None:
        sizes = sorted({cell.n for cell in grid.cells})
        for number, n in enumerate(sizes):
            color = SERIES[number % len(SERIES)]
            axes.axvline(n, color=color, linewidth=0.8, alpha=0.4)
            for data in ("activations", "shuffled"):
                cells: list[Cell] = sorted(
                    (cell for cell in grid.cells if (cell.n, cell.data) == (n, data)), key=lambda cell: cell.capacity
                )
                if not cells:
                    continue
                x, y = [cell.capacity for cell in cells], [cell.mean(split, "r2") for cell in cells]
                seeds = [[getattr(run, split).r2 for run in cell.runs] for cell in cells]
                real = data == "activations"
                label = f"n = {n:,}" if real else None
                axes.plot(x, y, "o-" if real else "s:", color=color, label=label, markersize=5)
                low, high = [min(each) for each in seeds], [max(each) for each in seeds]
                axes.fill_between(x, low, high, color=color, alpha=0.2)
        axes.set(xscale="log", xlabel="capacity F", ylabel="R²")
        log_ticks(axes.xaxis, [cell.capacity for cell in grid.cells])
        r2_axis(axes, [cell.mean(split, "r2") for cell in grid.cells] + [1.0])

    return draw


def law_plot(grid: Grid) -> Draw:
    """Critical capacities over n with their power laws."""

    def draw(axes: Axes) -> None:
        levels = list(dict.fromkeys(law.level for law in grid.laws))
        sizes: list[float] = []
        for law in (law for law in grid.laws if law.points):
            color, null = SERIES[levels.index(law.level) % len(SERIES)], law.data == "shuffled"
            n = [point.n for point in law.points]
            sizes += n
            axes.scatter(
                n,
                [point.capacity for point in law.points],
                marker="s" if null else "o",
                edgecolors=color,
                facecolors="none" if law.split == "train" else color,
                label=_name(law),
            )
            if law.exponent is not None and law.factor is not None:
                line = [law.factor * value**law.exponent for value in n]
                axes.plot(n, line, color=color, linestyle=":" if null else "-", linewidth=1)
        ends = [min(sizes), max(sizes)]
        axes.plot(ends, ends, color=QUIET, linestyle="--", linewidth=1, label="F = n")
        axes.set(xscale="log", yscale="log", xlabel="activations n", ylabel="critical capacity F_c")
        log_ticks(axes.xaxis, sizes)

    return draw


def _name(law: Law) -> str:
    return f"R² {law.level:g}, {law.split.replace('heldout', 'held-out')}{', shuffled' * (law.data == 'shuffled')}"
