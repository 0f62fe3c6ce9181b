"""Certificates: what coherence alone proves about atoms and codes (theory.md section 2).

Everything is computed under the metric, over living atoms, tile by tile: no F x F and no n x F x F matrix exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct, check_rows, unit_rows
from atom_lens.tensors import parallel
from atom_lens.tensors.tiles import over_tiles

# The error of float32 cosines is below this; a certificate must hold with it added.
_MARGIN = 2e-6
# Entries in a batch of gathered Gram rows, (codes, K, F).
_CELLS = 1 << 25


def whitened_units(atoms: Float[Tensor | np.ndarray, "F d"], metric: AtomicInnerProduct | None) -> Float[Tensor, "F d"]:
    """Atoms of unit norm in the space where the AIP is the Euclidean inner product; same dtype."""
    atoms = check_rows(atoms, "atoms", None if metric is None else metric.width)
    whitened = atoms if metric is None else torch.cat([metric.whiten(part) for part in atoms.split(8192)])
    return unit_rows(whitened).to(atoms.dtype)


def atom_coherence(
    atoms: Float[Tensor, "F d"], metric: AtomicInnerProduct | None = None, tile: int = 1024
) -> Float[Tensor, " F"]:
    """For every atom the largest coherence with another one, max_j |<d_i, d_j>_S|. Shape (F,); 0 for a single atom."""
    units = whitened_units(atoms, metric)

    def ends(rows: slice, columns: slice, cosines: Tensor) -> tuple[slice, slice, Tensor, Tensor]:
        coherence = cosines.abs_()
        if rows == columns:
            coherence.fill_diagonal_(0)
        return rows, columns, coherence.amax(dim=1), coherence.amax(dim=0)

    largest = torch.zeros(len(units), dtype=units.dtype, device=units.device)
    for rows, columns, of_rows, of_columns in over_tiles(units, ends, tile):
        largest[rows] = torch.maximum(largest[rows], of_rows)
        largest[columns] = torch.maximum(largest[columns], of_columns)
    return parallel.largest(largest).clamp_(max=1)


def rip_bound(coherence: float, k: int) -> float:
    """delta_K <= (K - 1) mu: below 1 no two K/2-sparse codes have the same reconstruction (theory.md section 2)."""
    return max(k - 1, 0) * coherence


def unique_atoms(coherence: Float[Tensor, " F"], k: Int[Tensor, " F"]) -> Bool[Tensor, " F"]:
    """Strict, per atom: max_j |<d_i, d_j>_S| < 1 / (2 K_i - 1), K_i the largest L0 of a code in which i is active.

    Args:
        coherence: `atom_coherence`, shape (F,).
        k: per atom, at least 1, shape (F,).
    """
    if coherence.shape != k.shape or int(k.min()) < 1:
        raise AtomLensError(
            f"k must hold one number >= 1 for each of {len(coherence)} atoms, got shape {tuple(k.shape)}"
        )
    return coherence.double() < 1 / (2 * k.double() - 1) - _MARGIN


@dataclass(frozen=True)
class CodeCertificates:
    """Per code, whether its own support proves it unique. Shape (n,) each; an empty code proves nothing.

    Attributes:
        babel: max_{j outside} mu_1(j) + max_{i inside} mu_1(i) < 1, with mu_1 the coherence summed over the support
            (the Babel condition of Tropp 2004 on this one support). Implies `exact_recovery`.
        exact_recovery: max_{j outside} ||D_L^+ d_j||_1 < 1: matching pursuit and basis pursuit both find the code.
        k: size of the support.
    """

    babel: Bool[Tensor, " n"]
    exact_recovery: Bool[Tensor, " n"]
    k: Int[Tensor, " n"]


def certify_codes(
    atoms: Float[Tensor, "F d"], codes: Float[Tensor, "n F"], metric: AtomicInnerProduct | None = None
) -> CodeCertificates:
    """Which codes their own support certifies as unique.

    Args:
        atoms: rows, shape (F, d).
        codes: over these atoms, shape (n, F); only their supports matter.
        metric: the AIP, or None for Euclidean coherence.
    """
    if codes.shape[1:] != atoms.shape[:1]:
        raise AtomLensError(f"codes have shape {tuple(codes.shape)}, expected (rows, {len(atoms)})")
    units = whitened_units(atoms, metric)
    k = (codes != 0).sum(dim=1)
    babel, exact = torch.zeros_like(k, dtype=torch.bool), torch.zeros_like(k, dtype=torch.bool)
    for rows, size in _equal_sizes(k, len(units)):
        if size > units.shape[1]:
            continue  # more atoms than dimensions are linearly dependent: no such support is unique
        support = (codes[rows] != 0).nonzero()[:, 1].view(len(rows), size)
        inside = units[support]
        cross = einsum(inside, units, "n k d, F d -> n k F")
        gram = torch.gather(cross, 2, support[:, None, :].expand(-1, size, -1)).double()
        summed = cross.abs().sum(dim=1)
        largest_inside = summed.gather(1, support).amax(dim=1) - 1  # without the atom itself
        outside = summed.scatter(1, support, 0).amax(dim=1)
        babel[rows] = largest_inside + outside < 1 - size * _MARGIN
        solved, info = torch.linalg.solve_ex(gram, cross.double())
        weights = solved.abs().sum(dim=1).scatter(1, support, 0).amax(dim=1)
        independent = torch.linalg.eigvalsh(gram)[:, 0] > size * _MARGIN
        exact[rows] = independent & (info == 0) & (weights < 1 - size * _MARGIN)
    return CodeCertificates(babel, exact, k)


def _equal_sizes(k: Int[Tensor, " n"], n_atoms: int) -> Iterator[tuple[Int[Tensor, " rows"], int]]:
    """Batches of rows whose codes have the same number of active atoms."""
    for size in k.unique().tolist():
        if size:
            rows = (k == size).nonzero()[:, 0]
            for part in rows.split(max(1, _CELLS // (size * n_atoms))):
                yield part, size
