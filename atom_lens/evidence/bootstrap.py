"""Bootstrap over subjects: how far a held-out figure, and its distance from a null, would move with other subjects."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import bootstrap
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.evidence.faithfulness import explained
from atom_lens.evidence.measure import Observation
from atom_lens.tensors.checks import Labels, checked_seed, labels

LEVEL = 0.95
_RESAMPLES = 1000

FIGURES: dict[str, Callable[[Observation, Int[Tensor, " m"]], float]] = {
    "r2": lambda seen, rows: explained(seen.residual[rows], seen.total[rows]),
    "r2_aip": lambda seen, rows: explained(seen.residual_aip[rows], seen.total_aip[rows]),
    "q_star": lambda seen, rows: seen.found.q_star_of(seen.l0[rows]),
}


def intervals(
    seen: Observation, null: Observation | None = None, groups: Labels | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95% percentile intervals of R², R² (AIP) and q*, or of their excess over `null` on the same activations.

    Whole subjects are drawn with replacement, so that several activations of one subject do not pose as several
    witnesses. The dictionary, its pairs and the mean of the split stay as they are.

    Args:
        seen: the atoms on a split.
        null: what they are held against, row by row; None for the figures themselves.
        groups: the subject of every row; None takes each row as a subject.
        seed: of the draws.

    Returns:
        figure -> [low, high].
    """
    names = list(range(len(seen))) if groups is None else labels(groups, len(seen), "groups")
    if null is not None and len(null) != len(seen):
        raise AtomLensError(f"the null has {len(null)} rows, expected {len(seen)}, as the split has")
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    if len(members) < 2:
        raise AtomLensError("a bootstrap over subjects needs at least 2 subjects")
    rows_of = [np.asarray(rows) for rows in members.values()]
    alone = len(rows_of) == len(seen)

    def statistic(chosen: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(chosen if alone else np.concatenate([rows_of[i] for i in chosen]))
        values = [figure(seen, rows) - (figure(null, rows) if null else 0.0) for figure in FIGURES.values()]
        return np.asarray(values)

    found = _resampled((np.arange(len(rows_of)),), statistic, seed, vectorized=False)
    return {name: [float(found.low[i]), float(found.high[i])] for i, name in enumerate(FIGURES)}


def mean_interval(values: Float[Tensor, " n"], seed: int = 0) -> dict[str, Any]:
    """{"mean", "interval"}: the mean over independent witnesses, and its 95% percentile interval."""
    found = _resampled((values.detach().double().cpu().numpy(),), lambda v, axis: v.mean(axis=axis), seed)
    return {"mean": float(values.double().mean()), "interval": [float(found.low), float(found.high)]}


def ratio_interval(above: Float[Tensor, " n"], below: Float[Tensor, " n"], seed: int = 0) -> dict[str, Any] | None:
    """{"mean", "interval"} of mean(above) / mean(below) on the same witnesses.

    None where mean(below) cannot be told from zero: its own interval reaches 0, and the ratio would mean nothing.
    """
    if mean_interval(below, seed)["interval"][0] <= 0:
        return None
    pairs = tuple(part.detach().double().cpu().numpy() for part in (above, below))
    # A resample may still miss every witness that `below` counts; it then says nothing about the ratio.
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _resampled(pairs, lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis), seed)
    return {"mean": float(pairs[0].mean() / pairs[1].mean()), "interval": [float(found.low), float(found.high)]}


def _resampled(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int, vectorized: bool = True
) -> Any:
    """scipy's percentile interval: `.low`, `.high`."""
    return bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        paired=True,
        vectorized=vectorized,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(checked_seed(seed)),
    ).confidence_interval
