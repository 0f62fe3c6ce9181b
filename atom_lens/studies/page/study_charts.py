"""Figures of studies: the capacity cliff and its law, and what edits of codes do to answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from atom_lens.studies.page.charts import LEAST, QUIET, SERIES, figure, log_ticks, mark, note_below, reach

# From cold to warm, in tones that stand out from a light and from a dark page alike.
_SCALE = [SERIES[index] for index in (1, 5, 3, 6, 2, 0)]
KINDS = {
    "patch": "ceiling: whole activation of B",
    "swap": "swap, x + (z_B − z_A) D",
    "replace": "swap and drop the error",
    "exchange": "exchange by code, every token",
    "rest": "what the swap leaves out",
    "other": "null: a third subject's code, same norm",
    "random": "null: random atoms, same norm",
    "none": "floor: no edit",
}
_SHORT = {
    "patch": "ceiling",
    "means": "class means",
    "swap": "swap",
    "replace": "swap, no error",
    "exchange": "exchange",
    "rest": "left out",
    "other": "null: third subject",
    "random": "null: random atoms",
    "none": "no edit",
}


def cliff(found: Mapping[str, Any], split: str) -> go.Figure:
    """R² over F on one split, a line for each n, mean and range over seeds; the shuffled null dashed."""
    made = figure("capacity F", "R²")
    sizes = sorted({cell["n"] for cell in found["cells"]})
    colors = [str(color) for color in sample_colorscale(_SCALE, np.linspace(0, 1, len(sizes)).tolist())]
    means: list[float] = []
    for n, color in zip(sizes, colors, strict=True):
        made.add_vline(n, line={"color": color, "width": 1}, opacity=0.4)
    for data in dict.fromkeys(cell["data"] for cell in found["cells"]):
        null = data == "shuffled"
        for n, color in zip(sizes, colors, strict=True):
            cells = sorted((c for c in found["cells"] if (c["n"], c["data"]) == (n, data)), key=lambda c: c["capacity"])
            r2 = [[run[split]["r2"] for run in cell["runs"]] for cell in cells]
            mean = [float(np.mean(seeds)) for seeds in r2]
            means += mean
            made.add_scatter(
                x=[cell["capacity"] for cell in cells],
                y=mean,
                error_y={
                    "array": [max(seeds) - m for seeds, m in zip(r2, mean, strict=True)],
                    "arrayminus": [m - min(seeds) for seeds, m in zip(r2, mean, strict=True)],
                    "width": 0,
                    "thickness": 1,
                },
                mode="lines+markers",
                name=f"n = {n:,}",
                legendgroup=str(n),
                showlegend=not null,
                opacity=0.65 if null else 1,
                line={"color": color, "dash": "dot" if null else "solid", "width": 1.4 if null else 2.2},
                marker=mark("square" if null else "circle", color, split, 5 if null else 7),
                hovertemplate=f"n = {n:,}, F = %{{x}}: R² %{{y:.4f}}<extra>{data}, {len(r2[0])} seeds</extra>",
            )
    made.update_xaxes(**log_ticks([cell["capacity"] for cell in found["cells"]]))
    values = [run[part]["r2"] for cell in found["cells"] for run in cell["runs"] for part in ("train", "heldout")]
    made.update_yaxes(range=reach([*values, 0.0, 1.0], LEAST, 1.0), zeroline=True)
    note_below(made, means)
    return made


def law(found: Mapping[str, Any]) -> go.Figure | None:
    """Critical capacities over n with their power laws, log by log; None where the grid holds no crossing."""
    made = figure("activations n", "critical capacity F_c")
    levels = list(dict.fromkeys(one["level"] for one in found["laws"]))
    for one in (one for one in found["laws"] if one["points"]):
        color, null = SERIES[levels.index(one["level"]) % len(SERIES)], one["data"] == "shuffled"
        n = [point["n"] for point in one["points"]]
        name = f"R² {one['level']:g}, {one['split'].replace('heldout', 'held-out')}" + ", shuffled" * null
        made.add_scatter(
            x=n,
            y=[point["capacity"] for point in one["points"]],
            mode="markers",
            name=name,
            legendgroup=name,
            marker=mark("square" if null else "circle", color, one["split"]),
            hovertemplate="n = %{x:,}: F_c = %{y:,.0f}<extra>" + name + "</extra>",
        )
        if one["exponent"] is not None:
            made.add_scatter(
                x=n,
                y=[one["factor"] * value ** one["exponent"] for value in n],
                mode="lines",
                legendgroup=name,
                showlegend=False,
                hoverinfo="skip",
                line={"color": color, "width": 1.4, "dash": "dot" if null else "solid"},
            )
    if not made.data:
        return None
    sizes = sorted({point["n"] for one in found["laws"] for point in one["points"]})
    made.add_scatter(x=sizes, y=sizes, mode="lines", name="F = n", line={"color": QUIET, "width": 1, "dash": "dash"})
    made.update_xaxes(**log_ticks(sizes))
    made.update_yaxes(type="log", tickformat=",", dtick="D2")
    return made


def flips(result: Mapping[str, Any]) -> go.Figure:
    """Share of answers flipped to B's, by kind of edit and dictionary, with 95% intervals; the ceiling as a line."""
    made = figure("share of answers flipped to B's", "")
    first = result["cells"][0]["swap"]
    bounds = {_SHORT["patch"]: first["patch"], _SHORT["means"]: result["class_means"], _SHORT["none"]: first["none"]}
    series = [("of the model", QUIET, {label: found["flips"] for label, found in bounds.items()})]
    for number, cell in enumerate(result["cells"]):
        found = {_SHORT[kind]: one["flips"] for kind, one in cell["swap"].items() if _SHORT[kind] not in bounds}
        series.append((cell["name"], SERIES[number % len(SERIES)], found))
    names = [cell["name"] for cell in result["cells"]]
    for name, color, found in series:
        made.add_scatter(
            x=[one["mean"] for one in found.values()],
            y=list(found),
            error_x=_spread(list(found.values())),
            mode="markers",
            orientation="h",
            offsetgroup=name if name in names else names[0],
            cliponaxis=False,
            name=name,
            marker=mark("circle", color, "heldout", 9),
            hovertemplate="%{y}: %{x:.3f}<extra>%{fullData.name}</extra>",
        )
    made.add_vline(first["patch"]["flips"]["mean"], line={"color": QUIET, "dash": "dash", "width": 1})
    made.update_layout(scattermode="group", scattergap=0.4)
    made.update_xaxes(tickformat=".0%", rangemode="tozero")
    made.update_yaxes(title=None, categoryorder="array", categoryarray=list(reversed(_SHORT.values())))
    return made


def doses(result: Mapping[str, Any]) -> go.Figure:
    """Rise of the log-odds of B over A with the dose of the swap."""
    made = figure("dose of the swap", "rise of the log-odds of B over A, nats")
    for number, cell in enumerate(result["cells"]):
        points = sorted((float(dose), one["log_odds"]) for dose, one in cell["doses"].items())
        color = SERIES[number % len(SERIES)]
        made.add_scatter(
            x=[0.0, *(dose for dose, _ in points)],
            y=[0.0, *(one["mean"] for _, one in points)],
            error_y=_spread([{"mean": 0, "interval": [0, 0]}, *(one for _, one in points)]),
            mode="lines+markers",
            name=cell["name"],
            line={"color": color},
            marker=mark("circle", color, "heldout"),
        )
    return made


def ablations(result: Mapping[str, Any]) -> go.Figure:
    """Drop of ln p(A) when A's k strongest atoms are ablated, by attribution, by activation, and at random."""
    made = figure("atoms ablated", "drop of ln p(A), nats")
    ks: set[int] = set()
    for number, cell in enumerate(result["cells"]):
        color = SERIES[number % len(SERIES)]
        for rank, dash in (("attribution", "solid"), ("activation", "dash"), ("random", "dot")):
            found = [
                (int(name.split()[1]), one["drop"]) for name, one in cell["ablate"].items() if name.startswith(rank)
            ]
            ks |= {k for k, _ in found}
            made.add_scatter(
                x=[k for k, _ in found],
                y=[one["mean"] for _, one in found],
                error_y=_spread([one for _, one in found]),
                mode="lines+markers",
                name=f"{cell['name']}, {'null: ' * (rank == 'random')}{rank}",
                opacity=0.6 if rank == "random" else 1,
                line={"color": color, "dash": dash},
                marker=mark("x" if rank == "random" else "circle", color, "heldout", 7),
            )
    made.update_xaxes(type="log", tickvals=sorted(ks))
    return made


def _spread(found: list[Any]) -> dict[str, Any]:
    return {
        "array": [one["interval"][1] - one["mean"] for one in found],
        "arrayminus": [one["mean"] - one["interval"][0] for one in found],
        "thickness": 1.2,
        "width": 0,
    }
