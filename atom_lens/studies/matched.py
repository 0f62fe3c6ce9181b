"""Matched sparsity: what units reach at the same held-out L0, between two points of their sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from atom_lens.dictionaries import kind
from atom_lens.studies.frontier import COMPETING, mean_of
from atom_lens.studies.report_text import aligned

_FIGURES = ("r2", "r2_aip", "q_star")


def matched(cells: Sequence[Mapping[str, Any]], l0: float) -> list[dict[str, Any]]:
    """Held-out figures of every unit at `l0` active units, linear in log L0 between two points of its sweep.

    Means over seeds. A unit whose sweep does not reach from below to above `l0` has no figures there: nothing is
    extrapolated.

    Returns:
        Dicts of l0, unit, `between` (the L0 of the two points; None without), r2, r2_aip, q_star, train_r2, pw_mcc.
    """
    found = []
    for unit in dict.fromkeys(cell["unit"] for cell in cells):
        points = sorted(
            ((mean_of(cell, "heldout", "l0", "mean"), cell) for cell in cells if cell["unit"] == unit),
            key=lambda point: point[0],
        )
        row: dict[str, Any] = {"l0": l0, "unit": unit, "between": None}
        for (low, lower), (high, upper) in pairwise(points):
            if 0 < low <= l0 <= high:
                share = 0.0 if low == high else float(np.log(l0 / low) / np.log(high / low))
                pairs = {key: (mean_of(lower, "heldout", key), mean_of(upper, "heldout", key)) for key in _FIGURES}
                pairs["train_r2"] = mean_of(lower, "train", "r2"), mean_of(upper, "train", "r2")
                if lower["identity"] and upper["identity"]:
                    pairs["pw_mcc"] = lower["identity"]["pw_mcc"], upper["identity"]["pw_mcc"]
                row |= {"between": [low, high], **{key: a + share * (b - a) for key, (a, b) in pairs.items()}}
                break
        found.append(row)
    return found


def matched_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A block per L0, best held-out R² first, nulls and controls among them."""
    blocks = []
    for l0 in dict.fromkeys(row["l0"] for row in rows):
        cells = [[f"at L0 {l0:g}, held-out", "R²", "R² (AIP)", "q*", "R² train", "PW-MCC", "between L0"]]
        here = [row for row in rows if row["l0"] == l0 and row["between"]]
        for row in sorted(here, key=lambda row: -row["r2"]):
            low, high = row["between"]
            figures = [f"{row[key]:.3f}" if key in row else "" for key in (*_FIGURES, "train_r2", "pw_mcc")]
            cells.append([kind(row["unit"]).label, *figures, f"{low:.1f} and {high:.1f}"])
        missing = [
            kind(row["unit"]).label
            for row in rows
            if row["l0"] == l0 and not row["between"] and kind(row["unit"]).role in COMPETING
        ]
        text = aligned(cells)
        blocks.append(text + (f"\nno sweep across this L0: {', '.join(missing)}" if missing else ""))
    return "\n\n".join(blocks)
