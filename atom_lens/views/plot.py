"""One way to draw: matplotlib panels, each as an SVG for the page, and side by side as a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from atom_lens.storage.files import replacing, visible

# Colours that stand out on both a light and a dark page.
ATOMS, QUIET = "#d6506a", "#8a8f98"
SERIES = [ATOMS, "#3b82c4", "#d9772b", "#3a9a5f", "#9067c6", "#1f9aa8", "#b5892a", "#c2559d"]
LEAST = -0.5  # points of R² below this are counted, not drawn
_INK = "#123456"  # becomes the colour of the page's text
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "atom-lens",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.titlesize": 11,
}

# Draws one panel on the axes it is given.
Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Panel:
    """A plot with a title and a caption; one drawing for each choice that the reader has (a hook)."""

    title: str
    caption: str
    draws: Mapping[str, Draw]


def svg(draw: Draw) -> str:
    """One panel for the page: as wide as a phone, with real text, in the colour of the page's text."""
    with rc_context(_STYLE):
        figure = _figure([("", draw)], width=4.4)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)


def save_png(panels: Sequence[tuple[str, Draw]], path: Path, title: str = "") -> None:
    """All panels side by side in one picture, written whole or not at all."""
    black: dict[Any, Any] = {key: "black" if value == _INK else value for key, value in _STYLE.items()}
    with rc_context(black):
        figure = _figure(panels, width=5.6)
        if title:
            figure.suptitle(plain(title), fontsize=12)
        with replacing(path) as temporary:
            # Without the software's version, so that the same result gives the same file.
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})


def _figure(panels: Sequence[tuple[str, Draw]], width: float) -> Figure:
    figure, most = Figure(layout="constrained"), 0
    for axes, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.set_title(title)
        handles, labels = axes.get_legend_handles_labels()
        if len(set(labels)) > 1:
            once = dict(zip(labels, handles, strict=True))
            columns = 1 if max(map(len, once)) > 18 else 2
            most = max(most, -(-len(once) // columns))
            below = axes.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # of the label, in inches
            axes.legend(
                list(once.values()),
                list(once),
                loc="upper left",
                bbox_to_anchor=(-0.05, 0),
                bbox_transform=below,
                ncols=columns,
            )
    figure.set_size_inches(width * len(panels), 4.2 + 0.2 * max(0, most - 3))
    return figure


def plain(text: str) -> str:
    """Literal text: matplotlib would read dollar signs as mathematics."""
    return visible(text).replace("$", r"\$")


def points(
    axes: Axes,
    x: Sequence[float | int],
    y: Sequence[float | int],
    *,
    label: str,
    color: str,
    marker: str,
    hollow: bool = False,
) -> None:
    """Markers: filled for held-out, hollow for train."""
    look: dict[str, Any] = {"color": color}  # crosses cannot be filled
    if marker not in "x+":
        look = {"edgecolors": color, "facecolors": "none" if hollow else color}
    axes.scatter(x, y, s=45, marker=marker, label=plain(label), linewidths=1.3, clip_on=False, zorder=3, **look)


def r2_axis(axes: Axes, values: Sequence[float]) -> None:
    """An axis of R² from -0.5 to 1 at most, with a note of how many values lie below."""
    low = min([*values, 0.0])
    axes.set_ylim(max(LEAST, low) - 0.04, min(1.0, max([*values, 0.05])) + 0.05)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    below = sum(value < LEAST for value in values)
    if below:
        text = f"{below} point{'s' * (below > 1)} below {LEAST}, down to {low:.3g}"
        axes.text(0.02, 0.02, text, transform=axes.transAxes, fontsize=9)


def log_ticks(axis: Any, values: Sequence[float | int]) -> None:
    """Ticks of a logarithmic axis at measured values, as many as their labels have room for."""
    ticks: list[float | int] = []
    for value in sorted(set(values)):
        if not ticks or value >= 1.9 * ticks[-1]:
            ticks.append(value)
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_ticks([], minor=True)
