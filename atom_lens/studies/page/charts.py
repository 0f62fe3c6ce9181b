"""What all figures share: colours that hold on a light and on a dark page, and panels that the page draws by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

ATOMS = "#d6506a"
QUIET = "#8a8f98"
SERIES = [ATOMS, "#3b82c4", "#d9772b", "#3a9a5f", "#9067c6", "#1f9aa8", "#b5892a", "#c2559d"]
LEAST = -0.5  # R² below is counted, not drawn


@dataclass(frozen=True)
class Panel:
    """A figure with a title and one sentence on what is seen; one figure for each thing the reader may choose."""

    title: str
    caption: str
    figures: Mapping[str, go.Figure]


def figure(x: str, y: str, **layout: Any) -> go.Figure:
    """An empty figure with titled axes; colours of paper, grid and text are the page's."""
    made = go.Figure()
    made.update_layout(
        template=go.layout.Template(),
        margin={"l": 64, "r": 12, "t": 8, "b": 52},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        hoverlabel={"namelength": -1},
        **layout,
    )
    made.update_xaxes(title={"text": x, "standoff": 8})
    made.update_yaxes(title={"text": y, "standoff": 8})
    return made


def mark(symbol: str, color: str, split: str, size: int = 9) -> dict[str, Any]:
    """A marker: filled for held-out, hollow for train."""
    hollow = split == "train"
    symbol, width = (f"{symbol}-open", 1.6) if hollow else (symbol, 0)
    return {"symbol": symbol, "color": color, "size": size, "line": {"width": width, "color": color}}


def r2_of(figures: Mapping[str, Any]) -> float:
    """R² of a dictionary, of a drawn null at its best (docs/report.md)."""
    return figures.get("r2_euclidean_pursuit", figures["r2"])


def value_of(figures: Mapping[str, Any], key: str) -> float:
    """A figure of a split by its name in report.json."""
    return r2_of(figures) if key == "r2" else figures[key]


def reach(values: list[float], low: float, high: float) -> list[float]:
    """An axis that shows all `values`, but nothing beyond `low` and `high`, with a little room."""
    least, most = max(low, min(values)), min(high, max(values))
    room = 0.06 * max(most - least, 0.05)
    return [least - room, most + room]


def log_ticks(values: Sequence[int]) -> dict[str, Any]:
    """Ticks at measured values of a logarithmic axis, as many as leave their labels room on a phone."""
    ticks: list[int] = []
    for value in sorted(set(values)):
        if not ticks or value >= 1.9 * ticks[-1]:
            ticks.append(value)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}


def note_below(made: go.Figure, values: list[float]) -> None:
    """Say how many of `values` lie below what is drawn."""
    low = sum(value < LEAST for value in values)
    if low:
        text = f"{low} point{'s' * (low > 1)} below {LEAST}, down to {min(values):.3g}"
        made.add_annotation(x=0, y=0, xref="paper", yref="paper", xanchor="left", text=text, showarrow=False)
