"""Purity: whether the rows at which a latent is active share a label, such as a country, more than by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csc_array
from scipy.stats import false_discovery_control
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.tensors import checks as inputs
from atom_lens.tensors.checks import Labels

LEAST = 5  # a latent that is active at fewer rows tells nothing
_TIE = 1e-9  # the same counts may sum to numbers that differ in the last digits
_ALPHA = 0.05
_AT_ONCE = 1 << 20  # entries of all permutations processed together
_SPARSE = 16  # above as many cells of a table per entry, sorting the entries takes less time and memory


@dataclass(frozen=True)
class Score:
    """A score of every latent that was kept, and the same with labels permuted over the rows.

    Attributes:
        observed: shape (latents,).
        null: shape (permutations, latents); each permutation is the same for all latents.
    """

    observed: np.ndarray
    null: np.ndarray

    @property
    def p(self) -> np.ndarray:
        """Share of the permutations, the identity included, that reach what was observed; shape (latents,)."""
        reached = (self.null >= self.observed - _TIE).sum(axis=0)
        return (1 + reached) / (1 + len(self.null))

    @property
    def figures(self) -> dict[str, Any]:
        """Means over the latents with their null, and the share of latents above their own null."""
        means = self.null.mean(axis=1)
        return {
            "mean": float(self.observed.mean()),
            "null": float(means.mean()),
            "null_interval": np.quantile(means, [0.025, 0.975]).tolist(),
            "excess": float(self.observed.mean() - means.mean()),
            "above_null": float((self.p <= _ALPHA).mean()),
            "above_null_fdr": float((false_discovery_control(self.p) <= _ALPHA).mean()),
        }


@dataclass(frozen=True)
class Purity:
    """How latents relate to the labels of the rows at which they are active.

    Attributes:
        latents: the latents active often enough to tell anything, shape (latents,).
        left_out: how many are not.
        active: number of rows at which each latent is active, shape (latents,).
        information: mutual information of "active" and the label, in bits. By chance it is above 0, the more so the
            fewer rows there are; so is its null, and their difference is what counts.
        share: of the commonest label among the strongest rows of a latent.
        entropy: of the labels, in bits.
    """

    latents: np.ndarray
    left_out: int
    active: np.ndarray
    information: Score
    share: Score
    entropy: float

    @property
    def figures(self) -> dict[str, Any]:
        """Plain data: numbers of latents, "information" (in bits) and "purity", each None where no latent is left."""
        some = len(self.latents) > 0
        return {
            "latents": len(self.latents),
            "left_out": self.left_out,
            "active_p50": float(np.median(self.active)) if some else None,
            "entropy": self.entropy,
            "information": self.information.figures if some else None,
            "purity": self.share.figures if some else None,
        }


def purity(
    codes: Any, labels: Labels, *, top: int = 10, least: int = LEAST, permutations: int = 2000, seed: int = 0
) -> Purity:
    """Mutual information with the labels, and purity of the strongest rows, for every latent, each with its null.

    Args:
        codes: shape (n, F), any sparse array, a numpy array or a tensor; a latent is active at the rows of its
            non-zero entries. No two rows may be of one subject: they are alike, permuted labels would separate them,
            and latents that know nothing would pass.
        labels: of the rows, shape (n,).
        top: how many rows purity looks at, the largest in magnitude; all rows of a latent that has fewer.
        least: latents that are active at fewer rows are left out.
        permutations: of the labels over the rows, shared by all latents, so that their means have a null too.
        seed: of the permutations.

    Raises:
        AtomLensError: labels of another length, or all the same.
    """
    if isinstance(codes, Tensor):
        codes = codes.detach().cpu().double().numpy()
    codes = csc_array(codes, copy=True)
    shape: Any = codes.shape
    n, n_latents = shape
    names = inputs.labels(labels, n, "labels")
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(number) < 2:
        raise AtomLensError("all labels are the same, purity needs at least 2")
    kinds = np.array([number[name] for name in names])
    totals = np.bincount(kinds)
    codes.eliminate_zeros()
    often = np.diff(codes.indptr)
    kept = often >= least
    column = np.repeat(np.arange(n_latents), often)
    order = np.lexsort((-np.abs(codes.data), column))
    rank = np.arange(len(column)) - codes.indptr[column]
    chosen = kept[column]
    rows, latent, leading = codes.indices[order][chosen], (np.cumsum(kept) - 1)[column[chosen]], rank[chosen] < top
    active = often[kept]
    # x log2 x for every possible count
    counts = np.arange(n + 1, dtype=np.float64)
    xlogx = counts * np.log2(np.maximum(counts, 1))

    def scores(permuted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both scores under each of some permutations, shape (some, latents)."""
        size = (len(permuted), len(active))
        owner = np.arange(len(permuted))[:, None] * len(active)
        keys = (owner + latent) * len(totals) + permuted[:, rows]
        (of, label), together = _counted(keys, len(totals))
        # Labels at which a latent is never active cancel out of the sum over the contingency table.
        cells = xlogx[together] + xlogx[totals[label] - together] - xlogx[totals[label]]
        joint = np.bincount(of, cells, minlength=size[0] * size[1]).reshape(size)
        (of, _), together = _counted(keys[:, leading], len(totals))
        commonest = np.zeros(size[0] * size[1])
        np.maximum.at(commonest, of, together)
        information = (joint - xlogx[active] - xlogx[n - active] + xlogx[n]) / n
        return information, commonest.reshape(size) / np.minimum(active, top)

    generator = np.random.default_rng(inputs.checked_seed(seed))
    (information,), (share,) = scores(kinds[None])
    at_once = max(1, _AT_ONCE // max(1, len(rows)))
    nulls = [
        scores(np.stack([generator.permutation(kinds) for _ in range(min(at_once, permutations - done))]))
        for done in range(0, permutations, at_once)
    ]
    entropy = float((xlogx[n] - xlogx[totals].sum()) / n)
    by_chance = [np.concatenate(part) for part in zip(*nulls, strict=True)]
    return Purity(
        np.flatnonzero(kept),
        int((~kept).sum()),
        active,
        Score(information, by_chance[0]),
        Score(share, by_chance[1]),
        entropy,
    )


def _counted(keys: np.ndarray, n_labels: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """((owner, label), count) of the keys that occur; a key is owner * n_labels + label."""
    if keys.size and keys.max() < _SPARSE * keys.size:
        table = np.bincount(keys.ravel())
        pairs = np.flatnonzero(table)
        together = table[pairs]
    else:
        pairs, together = np.unique(keys, return_counts=True)
    return np.divmod(pairs, n_labels), together
