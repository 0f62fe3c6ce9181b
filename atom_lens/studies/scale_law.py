"""The capacity law F_c(n): read off the grid, fitted, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import linregress, t

from atom_lens.storage.files import replacing

_LEAST_POINTS = 3  # of a line with an interval


def laws(cells: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> list[dict[str, Any]]:
    """For each kind of data, split and level of R²: the critical capacity at every n, and the power law through them.

    Returns:
        Dicts of data, split, level, `of` (how many n there are), points ({n, capacity}), exponent, exponent_interval
        (95%, of the regression of log F_c on log n), factor; the last three None where fewer than 3 n reach the level.
    """
    found = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        here = [cell for cell in cells if cell["data"] == data]
        sizes = sorted({cell["n"] for cell in here})
        for split in ("train", "heldout"):
            for level in levels:
                points = []
                for n in sizes:
                    critical = critical_capacity([cell for cell in here if cell["n"] == n], split, level)
                    if critical is not None:
                        points.append({"n": n, "capacity": critical})
                law = {"data": data, "split": split, "level": level, "of": len(sizes), "points": points}
                found.append({**law, **_line(points)})
    return found


def critical_capacity(cells: Sequence[Mapping[str, Any]], split: str, level: float) -> float | None:
    """The F at which the mean R² over seeds crosses `level` for good, between two capacities on a log scale.

    None where it never does, or lies above it from the smallest capacity on: the grid does not hold the crossing then.
    """
    ordered = sorted(cells, key=lambda cell: cell["capacity"])
    r2 = [float(np.mean([run[split]["r2"] for run in cell["runs"]])) for cell in ordered]
    below = [i for i, value in enumerate(r2) if value < level]
    if not below or below[-1] == len(r2) - 1:
        return None
    last = below[-1]
    share = (level - r2[last]) / (r2[last + 1] - r2[last])
    low, high = (np.log(ordered[i]["capacity"]) for i in (last, last + 1))
    return float(np.exp(low + share * (high - low)))


def _line(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if len(points) < _LEAST_POINTS:
        return {"exponent": None, "exponent_interval": None, "factor": None}
    n, capacity = (np.log([point[key] for point in points]) for key in ("n", "capacity"))
    fitted: Any = linregress(n, capacity)
    half = float(t.ppf(0.975, len(points) - 2) * fitted.stderr)
    slope = float(fitted.slope)
    return {
        "exponent": slope,
        "exponent_interval": [slope - half, slope + half],
        "factor": float(np.exp(fitted.intercept)),
    }


def draw(found: Mapping[str, Any], title: str, path: Path) -> None:
    """R² over F, a line per n: activations and the null, training in full and held-out in dashes; and F_c(n)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(cell["data"] for cell in found["cells"]))
    sizes = sorted({cell["n"] for cell in found["cells"]})
    colours = {n: colormaps["viridis"](0.9 * i / max(1, len(sizes) - 1)) for i, n in enumerate(sizes)}
    figure = Figure(figsize=(4.6 * (len(kinds) + 1), 4.2), layout="constrained")
    *panels, last = figure.subplots(1, len(kinds) + 1)
    for panel, kind in zip(panels, kinds, strict=True):
        for n in sizes:
            cells = sorted(
                (cell for cell in found["cells"] if cell["data"] == kind and cell["n"] == n),
                key=lambda cell: cell["capacity"],
            )
            capacities = [cell["capacity"] for cell in cells]
            for split, style in (("train", "o-"), ("heldout", "o--")):
                means = [np.mean([run[split]["r2"] for run in cell["runs"]]) for cell in cells]
                label = f"n = {n:,}" if split == "train" else None
                panel.plot(capacities, means, style, color=colours[n], markersize=3.5, label=label)
            panel.axvline(n, color=colours[n], linewidth=0.8, alpha=0.35)
        panel.set(xscale="log", xlabel="capacity F (thin lines: F = n)", ylabel="R²", ylim=(-0.55, 1.05))
        _plain(panel.xaxis, sorted({cell["capacity"] for cell in found["cells"]}))
        panel.set_title("activations" if kind == "activations" else "null: shuffled coordinates", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].plot([], [], "k-", label="training")
    panels[0].plot([], [], "k--", label="held-out")
    panels[0].legend(fontsize=8, frameon=False)
    for law in found["laws"]:
        if law["split"] != "train" or not law["points"]:
            continue
        n, f = zip(*((point["n"], point["capacity"]) for point in law["points"]), strict=True)
        exponent = "" if law["exponent"] is None else f": n^{law['exponent']:.2f}"
        style = "o-" if law["data"] == "activations" else "s:"
        last.plot(n, f, style, markersize=4, label=f"{law['data']}, R² {law['level']:g}{exponent}")
    last.plot(sizes, sizes, color="0.6", linewidth=0.9, label="F = n")
    last.set(xscale="log", yscale="log", xlabel="activations n", title="critical capacity, in sample")
    last.title.set_fontsize(10)
    _plain(last.xaxis, sizes)
    _plain(last.yaxis, sizes)
    last.grid(alpha=0.3)
    last.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _plain(axis: Any, ticks: Sequence[int]) -> None:
    """Ticks where something was measured, as whole numbers: powers of ten hide what lies between."""
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
    axis.set_ticks([], minor=True)
