"""The laws of the grid: the critical capacity over n, and what more activations gain held-out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import linregress, t

from atom_lens.studies.scale.result import Cell, Growth, Law, Point

_LEAST_POINTS = 3  # for a line with an interval
_LEAST_GROWTH = 4  # for a curve with three parameters


def laws(cells: Sequence[Cell], levels: Sequence[float]) -> list[Law]:
    """For each kind of data, split and level of R²: the critical capacity at every n, and the power law through them.

    The interval is the regression's, of log F_c on log n.
    """
    found = []
    for data in dict.fromkeys(cell.data for cell in cells):
        here = [cell for cell in cells if cell.data == data]
        sizes = sorted({cell.n for cell in here})
        for split in ("train", "heldout"):
            for level in levels:
                points = []
                for n in sizes:
                    critical = critical_capacity([cell for cell in here if cell.n == n], split, level)
                    if critical is not None:
                        points.append(Point(n=n, capacity=critical))
                line = _line(points)
                found.append(Law(data=data, split=split, level=level, of=len(sizes), points=points, **line))
    return found


def critical_capacity(cells: Sequence[Cell], split: str, level: float) -> float | None:
    """The F at which the mean R² over seeds crosses `level` for good, between two capacities on a log scale.

    None where it never does, or is above it from the smallest capacity on: then the grid does not contain the crossing.
    """
    ordered = sorted(cells, key=lambda cell: cell.capacity)
    r2 = [cell.mean(split, "r2") for cell in ordered]
    below = [i for i, value in enumerate(r2) if value < level]
    if not below or below[-1] == len(r2) - 1:
        return None
    last = below[-1]
    share = (level - r2[last]) / (r2[last + 1] - r2[last])
    low, high = (np.log(ordered[i].capacity) for i in (last, last + 1))
    return float(np.exp(low + share * (high - low)))


def _line(points: Sequence[Point]) -> dict[str, Any]:
    if len(points) < _LEAST_POINTS:
        return {}
    n, capacity = (np.log([getattr(point, key) for point in points]) for key in ("n", "capacity"))
    fitted: Any = linregress(n, capacity)
    half = float(t.ppf(0.975, len(points) - 2) * fitted.stderr)
    slope = float(fitted.slope)
    return {
        "exponent": slope,
        "exponent_interval": [slope - half, slope + half],
        "factor": float(np.exp(fitted.intercept)),
    }


def growth(cells: Sequence[Cell]) -> list[Growth]:
    """For each kind of data, norm and capacity how held-out R² grows with n."""
    found = []
    for data, capacity in dict.fromkeys((cell.data, cell.capacity) for cell in cells):
        here = sorted(
            (cell for cell in cells if (cell.data, cell.capacity) == (data, capacity) and cell.n > capacity),
            key=lambda cell: cell.n,
        )
        n = [cell.n for cell in here]
        for key in ("r2", "r2_aip"):
            curve = _saturation(n, [cell.mean("heldout", key) for cell in here])
            found.append(Growth(data=data, key=key, capacity=capacity, n=n, **curve))
    return found


def _saturation(n: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    if len(n) < _LEAST_GROWTH:
        return {}
    # In units of the smallest n the factor is the largest possible gain, so that all parameters have similar sizes.
    share = np.array(n) / n[0]
    start = (values[-1], values[-1] - values[0], 0.5)
    with warnings.catch_warnings():
        for kind in (OptimizeWarning, RuntimeWarning):  # values that leave a parameter open, or diverge
            warnings.simplefilter("error", kind)
        try:
            (limit, gain, exponent), _ = curve_fit(
                lambda m, a, b, c: a - b * m**-c, share, values, start, maxfev=10_000
            )
        except (RuntimeError, OptimizeWarning, RuntimeWarning):
            return {}
    return {"limit": float(limit), "factor": float(gain * n[0] ** exponent), "exponent": float(exponent)}
