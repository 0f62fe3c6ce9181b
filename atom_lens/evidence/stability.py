"""Stability q*: the share of pairs of atoms and of codes that satisfy the uniqueness condition (theory section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct, check_rows, unit_rows
from atom_lens.tensors import parallel
from atom_lens.tensors.checks import Mask, counts, mask
from atom_lens.tensors.tiles import over_tiles, pairs_of

# The smallest gap from a threshold 1/(2k-1) that a cosine must keep, per dtype: rounding may not turn a tie
# (two copies of one atom, say) into a pair that passes.
_TIE = {torch.float32: 2e-6, torch.float64: 1e-12}
_SCALE = 128.0  # a power of two: multiplying by it rounds nothing
_BINS = int(_SCALE**2)


@dataclass(frozen=True)
class Stability:
    """What `stability` found.

    Attributes:
        q_star: sup { q : mu_q < 1/(2 K_q - 1) }; 0 when no atom is alive.
        empty_codes: share of activations with K_i = 0. They satisfy the condition trivially.
        n_atoms: atoms whose pairs were counted.
        dead_atoms: atoms left out because they never fired.
        pairs: number of pairs counted, n_atoms (n_atoms - 1) / 2.
        max_coherence: mu, the largest coherence of a pair (0 when there is no pair).
        l0: sorted K_i, shape (n,).
        below: pairs of coherence < 1/(2k-1), for k from 0 to the largest L0.
    """

    q_star: float
    empty_codes: float
    n_atoms: int
    dead_atoms: int
    pairs: int
    max_coherence: float
    l0: Int[Tensor, " n"] = field(repr=False)
    coherence_counts: Int[Tensor, " bins"] = field(repr=False)
    below: Int[Tensor, " limits"] = field(repr=False)

    def q_star_of(self, counts: Int[Tensor, "*draws limits"]) -> Float[Tensor, "*draws"]:
        """q* of the same atoms with the codes of other activations, `counts[..., k]` of them with K_i = k.

        None of these may have more active atoms than were seen here.
        """
        return _q_star(self.below, self.n_atoms, self.pairs, counts)

    def coherence_quantile(self, q: float) -> float:
        """mu_q, the q-quantile of the pairwise coherences, to the width of a histogram bin (2⁻¹⁴)."""
        if not 0 <= q <= 1:
            raise AtomLensError(f"q is {q}, allowed is 0 to 1")
        if self.pairs == 0:
            return 0.0
        k = int((self.coherence_counts.cumsum(0) >= max(1, q * self.pairs)).nonzero()[0])
        return min((k + 0.5) / _BINS, self.max_coherence)

    def l0_quantile(self, q: float) -> int:
        """K_q, the smallest k with at least a share q of activations at K_i <= k."""
        if not 0 <= q <= 1:
            raise AtomLensError(f"q is {q}, allowed is 0 to 1")
        # ceil(q n) - 1, guarded against q * n landing a rounding error above a whole number.
        return int(self.l0[max(0, -int(-(q * len(self.l0) - 1e-9) // 1) - 1)])


@torch.no_grad()
def stability(
    atoms: Float[Tensor | np.ndarray, "F d"],
    l0: Int[Tensor | np.ndarray, " n"] | Sequence[int],
    metric: AtomicInnerProduct | None = None,
    alive: Mask | None = None,
    tile: int = 1024,
) -> Stability:
    """Exact q* of a dictionary and the L0 of its codes, in one tiled pass over the pairs of atoms.

    With G(t) the share of pairs of coherence < t and Phi(k) the share of activations with K_i <= k,
    ``q* = max over k with G(1/(2k-1)) > Phi(k-1) of min(Phi(k), G(1/(2k-1)))`` (theory.md section 2). Only the
    counts of pairs below 1, 1/3, 1/5, ... are kept, so besides the unit atoms it needs the memory of one tile.

    Args:
        atoms: rows of the dictionary, shape (F, d), in the dtype that coherences are computed in.
        l0: number of active atoms per activation, shape (n,).
        metric: the AIP, or None for Euclidean coherence.
        alive: which atoms fired on the data, shape (F,); None counts all as alive.
        tile: rows of a tile of pairs.

    Raises:
        AtomLensError: empty or non-finite input, negative L0, wrong widths, or an alive atom that is zero.
    """
    atoms = check_rows(atoms, "atoms", None if metric is None else metric.width)
    l0 = counts(l0, "l0")
    if l0.numel() == 0:
        raise AtomLensError("l0 is empty: q* needs the codes of at least one activation")
    living = atoms if alive is None else atoms[mask(alive, len(atoms), "alive").to(atoms.device)]
    n_atoms = len(living)
    ordered = l0.sort().values
    k_max = int(ordered[-1])

    pairs = n_atoms * (n_atoms - 1) // 2
    found = _count_pairs(_units(living, metric), k_max, tile) if pairs else _Pairs.none(k_max)
    q_star = _q_star(found.below, n_atoms, pairs, torch.bincount(ordered, minlength=k_max + 1))
    return Stability(
        q_star=float(q_star),
        empty_codes=float((ordered == 0).double().mean()),
        n_atoms=n_atoms,
        dead_atoms=len(atoms) - n_atoms,
        pairs=pairs,
        max_coherence=found.top,
        l0=ordered,
        coherence_counts=found.histogram,
        below=found.below,
    )


def _units(atoms: Float[Tensor, "F d"], metric: AtomicInnerProduct | None) -> Float[Tensor, "F d"]:
    """Unit atoms where the AIP is Euclidean, in chunks so that float64 is never held for all of them."""
    dtype = atoms.dtype if atoms.dtype in _TIE else torch.float32
    whitened = atoms if metric is None else torch.cat([metric.whiten(chunk).to(dtype) for chunk in atoms.split(8192)])
    return unit_rows(whitened.to(dtype))


class _Pairs(NamedTuple):
    """What one pass over the pairs finds: a histogram, counts below 1/(2k-1) for every k, the largest coherence."""

    histogram: Int[Tensor, " bins"]
    below: Int[Tensor, " limits"]
    top: float

    @classmethod
    def none(cls, k_max: int) -> _Pairs:
        return cls(torch.zeros(_BINS, dtype=torch.long), torch.zeros(k_max + 1, dtype=torch.long), 0.0)


def _count_pairs(units: Float[Tensor, "F d"], k_max: int, tile: int) -> _Pairs:
    """Exact counts at little more than the cost of the product.

    A bin of the histogram lies wholly on one side of every limit 1/(2k-1) that is not inside it, so only pairs in
    bins that contain a limit are compared with the limits. Atoms are scaled so that a product is in units of bins.
    """
    device, dtype = units.device, units.dtype
    ks = torch.arange(k_max, 0, -1, dtype=torch.float64)
    limits = ((1 / (2 * ks - 1) - _TIE[dtype]) * _BINS).to(device, dtype)  # ascending
    bins = torch.arange(_BINS + 1, dtype=torch.int32, device=device)
    bins_of_limits = limits.int()
    undecided = torch.isin(bins, bins_of_limits)
    flags = undecided.to(torch.uint8)

    def count(rows: slice, columns: slice, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs by bin; those in undecided bins by the number of limits they reach; the largest coherence in bins."""
        coherence = pairs_of(rows, columns, products).abs_()
        at = coherence.int()  # rounding may take a coherence above 1, but by less than a bin
        close = coherence[flags.index_select(0, at).view(torch.bool)]
        reached = torch.bincount(torch.bucketize(close, limits, right=True), minlength=k_max + 1)
        top = coherence.amax() if len(coherence) else coherence.new_zeros(())
        return torch.bincount(at, minlength=_BINS + 1), reached, top

    histogram = torch.zeros(_BINS + 1, dtype=torch.int64, device=device)
    reached = torch.zeros(k_max + 1, dtype=torch.int64, device=device)
    top = torch.zeros((), dtype=dtype, device=device)
    for by_bin, by_limit, largest in over_tiles(units * _SCALE, count, tile):
        histogram += by_bin
        reached += by_limit
        top = torch.maximum(top, largest)
    histogram, reached, top = parallel.summed(histogram), parallel.summed(reached), parallel.largest(top)
    reached.index_add_(0, torch.bucketize(bins, bins_of_limits)[~undecided], histogram[~undecided])
    histogram[_BINS - 1] += histogram[_BINS]  # a coherence of 1 lies in the last bin
    below = torch.cat([reached.sum()[None], reached.cumsum(0)[:k_max].flip(0)])
    return _Pairs(histogram[:_BINS].cpu(), below.cpu(), min(float(top) / _BINS, 1.0))


def _q_star(
    below: Int[Tensor, " limits"], n_atoms: int, pairs: int, counts: Int[Tensor, "*draws limits"]
) -> Float[Tensor, "*draws"]:
    if not n_atoms:
        return torch.zeros(counts.shape[:-1], dtype=torch.float64)
    cumulative = counts.cumsum(-1)  # n * Phi(k)
    n = cumulative[..., -1:]
    # Without pairs the condition holds for every k.
    g, whole = (below, pairs) if pairs else (torch.ones_like(below), 1)
    # Integer cross-multiplication keeps G > Phi exact.
    holds = g * n > (cumulative - counts) * whole
    return torch.minimum(cumulative.double() / n, g.double() / whole).where(holds, 0.0).amax(-1)
