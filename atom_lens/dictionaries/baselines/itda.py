"""Greedy data atoms: activations that the atoms before them explain worst (ITDA, Leask et al. 2025)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.nulls import Pursuit
from atom_lens.dictionaries.registry import Fixed, Setup, register
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row

_ROUNDS = 16
_CANDIDATES = 4096


def greedy_atoms(
    x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct, n_atoms: int, k: int, generator: torch.Generator
) -> Float[Tensor, "F d"]:
    """Centred activations: at first some drawn at random, then those with the largest share left over by a pursuit.

    Args:
        x: training activations, shape (n, d).
        metric: in whose norm they are pursued, and what is left over is measured.
        n_atoms: as many as there are rows, at most.
        k: atoms of a code.
        generator: draws the candidates.
    """
    mean = mean_row(x).to(torch.promote_types(x.dtype, torch.float32))
    n_atoms = min(n_atoms, len(x))
    step = max(k, -(-n_atoms // _ROUNDS))
    order = torch.randperm(len(x), generator=generator)
    atoms = _centred(x, order[:step], mean)
    at = step
    while len(atoms) < n_atoms:
        candidates = order[torch.arange(at, at + max(step, _CANDIDATES)) % len(order)]
        at += len(candidates)
        rows = _centred(x, candidates, mean)
        pursued = Pursuit(atoms, torch.zeros_like(mean), metric, min(k, *atoms.shape))
        left = metric.whiten(rows - pursued.decode(pursued.encode(rows))).square().sum(dim=1)
        worst = (left / metric.whiten(rows).square().sum(dim=1)).topk(min(step, n_atoms - len(atoms))).indices
        atoms = torch.cat([atoms, rows[worst]])
    return atoms[:n_atoms]


def _centred(x: Float[Tensor | Rows, "n d"], which: Tensor, mean: Float[Tensor, " d"]) -> Float[Tensor, "m d"]:
    rows = x[which.to(x.device)].to(mean) - mean
    return rows[rows.norm(dim=1) > 0]  # a row equal to the mean has no direction


def _make(setup: Setup, k: int) -> Pursuit:
    mean = mean_row(setup.x).to(torch.promote_types(setup.x.dtype, torch.float32))
    atoms = greedy_atoms(setup.x, setup.aip, setup.atoms.capacity, k, torch.Generator().manual_seed(0))
    return Pursuit(atoms, mean, setup.aip, min(k, *atoms.shape))


register(
    Fixed(
        name="itda",
        label="ITDA: greedy data points",
        role="baseline",
        color="#6f7d3c",
        marker="d",
        sparsity="l0",
        least=1.0,
        by_default=False,
        whole=False,
        make=_make,
    )
)
