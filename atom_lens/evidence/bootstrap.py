"""Bootstrap over subjects: how much a held-out number, or its excess over a null, would vary with other subjects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import one_hot

from atom_lens.errors import AtomLensError
from atom_lens.evidence.measure import Observation
from atom_lens.evidence.stability import Stability
from atom_lens.tensors.checks import Labels, checked_seed, labels

LEVEL = 0.95
_RESAMPLES = 1000
_DRAWN = 2**22  # subjects drawn at a time, for memory

FIGURES = ("r2", "r2_aip", "q_star")


def intervals(
    seen: Observation, null: Observation | None = None, groups: Labels | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """95% percentile intervals of R², R² (AIP) and q*, or of their excess over `null` on the same activations.

    Whole subjects are drawn with replacement, so that several activations of one subject do not count as independent
    observations. The dictionary, its pairs and the mean of the split stay fixed.

    Args:
        seen: the atoms on a split.
        null: what they are compared with, row by row; None for the numbers themselves.
        groups: the subject of every row; None takes each row as a subject.
        seed: of the draws.

    Returns:
        figure -> [low, high].
    """
    names = list(range(len(seen))) if groups is None else labels(groups, len(seen), "groups")
    if null is not None and len(null) != len(seen):
        raise AtomLensError(f"the null has {len(null)} rows, expected {len(seen)}, as the split has")
    subjects = {name: place for place, name in enumerate(dict.fromkeys(names))}
    if len(subjects) < 2:
        raise AtomLensError("a bootstrap over subjects needs at least 2 subjects")
    subject = torch.tensor([subjects[name] for name in names])
    both = [(one.found, *_sums(one, subject)) for one in (seen, null) if one is not None]

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        """R², R² (AIP) and q*, shape (3, draws), of the subjects in each row of `drawn`, weighted by their counts."""
        times = np.apply_along_axis(np.bincount, axis, drawn, minlength=len(subjects))
        own, *other = (_figures(found, k, torch.from_numpy(times).double() @ sums) for found, k, sums in both)
        return (own - other[0] if other else own).numpy()

    found = _resampled((np.arange(len(subjects)),), statistic, seed)
    return {name: [float(found.low[i]), float(found.high[i])] for i, name in enumerate(FIGURES)}


def _sums(seen: Observation, subject: Int[Tensor, " n"]) -> tuple[Int[Tensor, " levels"], Float[Tensor, "G columns"]]:
    """Each L0 that occurs; for every subject the sums that R² is made of, and how many of its codes have each L0."""
    levels, level = seen.l0.unique(return_inverse=True)
    squares = torch.stack([seen.residual, seen.total, seen.residual_aip, seen.total_aip], dim=1)
    each = torch.cat([squares, one_hot(level)], dim=1)
    return levels, each.new_zeros(int(subject.max()) + 1, each.shape[1]).index_add_(0, subject, each)


def _figures(
    found: Stability, levels: Int[Tensor, " levels"], sums: Float[Tensor, "draws columns"]
) -> Float[Tensor, "3 draws"]:
    residual, total, residual_aip, total_aip = sums[:, :4].T
    counts = torch.zeros(len(sums), len(found.below), dtype=torch.long)
    counts[:, levels] = sums[:, 4:].round().long()
    return torch.stack([1 - residual / total, 1 - residual_aip / total_aip, found.q_star_of(counts)])


def mean_interval(values: Float[Tensor, " n"], seed: int = 0) -> dict[str, Any]:
    """{"mean", "interval"}: the mean over independent observations, and its 95% percentile interval."""
    found = _resampled((values.detach().double().cpu().numpy(),), lambda v, axis: v.mean(axis=axis), seed)
    return {"mean": float(values.double().mean()), "interval": [float(found.low), float(found.high)]}


def ratio_interval(above: Float[Tensor, " n"], below: Float[Tensor, " n"], seed: int = 0) -> dict[str, Any] | None:
    """{"mean", "interval"} of mean(above) / mean(below) over the same observations.

    None where mean(below) cannot be told from zero: its own interval reaches 0, and the ratio means nothing.
    """
    if mean_interval(below, seed)["interval"][0] <= 0:
        return None
    pairs = tuple(part.detach().double().cpu().numpy() for part in (above, below))
    # A resample may still have only zeros in `below`; it then says nothing about the ratio.
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _resampled(pairs, lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis), seed)
    return {"mean": float(pairs[0].mean() / pairs[1].mean()), "interval": [float(found.low), float(found.high)]}


def _resampled(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], seed: int) -> Any:
    """scipy's percentile interval: `.low`, `.high`."""
    return bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        batch=max(1, min(_RESAMPLES, _DRAWN // len(samples[0]))),
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(checked_seed(seed)),
    ).confidence_interval
