"""Matched sparsity: what kinds reach at the same held-out L0, interpolated between two points of their sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from atom_lens.studies.compare.result import Cell, Matched


def matched(cells: Sequence[Cell], l0: float) -> list[Matched]:
    """Held-out values of every kind at `l0` active atoms, linear in log L0 between two points of its sweep.

    Means over seeds. A kind whose sweep does not cross `l0` has no values: nothing is extrapolated.
    """
    found = []
    for kind in dict.fromkeys(cell.kind for cell in cells):
        sweep = sorted(((_means(cell), _l0(cell)) for cell in cells if cell.kind == kind), key=lambda point: point[1])
        row = Matched(l0=l0, kind=kind)
        # A point within 3% is taken as it is: a threshold gives a slightly other L0 on other rows.
        near = [(point, at) for point, at in sweep if abs(at / l0 - 1) <= 0.03]
        for (lower, low), (upper, high) in [(near[0], near[0])] if near else pairwise(sweep):
            if near or 0 < low <= l0 <= high:
                share = 0.0 if low == high else float(np.log(l0 / low) / np.log(high / low))
                both = {key: lower[key] + share * (upper[key] - lower[key]) for key in lower if key in upper}
                row = Matched(l0=l0, kind=kind, between=[low, high], **both)
                break
        found.append(row)
    return found


def _l0(cell: Cell) -> float:
    return float(np.mean([run.heldout.l0.mean for run in cell.runs]))


def _means(cell: Cell) -> dict[str, float]:
    found = {
        key: float(np.mean([getattr(run.heldout, key) for run in cell.runs])) for key in ("r2", "r2_aip", "q_star")
    }
    found["train_r2"] = float(np.mean([run.train.r2 for run in cell.runs]))
    if losses := [run.loss.recovered for run in cell.runs if run.loss is not None]:
        found["recovered"] = float(np.mean(losses))
    return found if cell.identity is None else {**found, "pw_mcc": cell.identity.pw_mcc}
