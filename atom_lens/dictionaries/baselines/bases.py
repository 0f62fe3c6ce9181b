"""Bases that need no training: the neurons, and the eigenvectors of the metric (theory.md section 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.registry import Fixed, register
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row


class Basis:
    """Orthonormal directions with inner products as codes; it has what `observe` needs of an sae-lens SAE.

    Args:
        units: orthonormal rows, shape (k, d).
        mean: subtracted before and added after, shape (d,).
    """

    def __init__(self, units: Float[Tensor, "k d"], mean: Float[Tensor, " d"]) -> None:
        self.W_dec: Float[Tensor, "k d"] = units
        self.mean = mean

    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return (x - self.mean) @ self.W_dec.T

    def decode(self, feature_acts: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return feature_acts @ self.W_dec + self.mean


def neurons(x: Float[Tensor | Rows, "n d"]) -> Basis:
    """The standard basis with the raw activation as code: R² = 1 and K = d."""
    return Basis(torch.eye(x.shape[1], device=x.device), torch.zeros(x.shape[1], device=x.device))


def principal(x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct, k: int) -> Basis:
    """The k leading eigenvectors of C, the same for every activation.

    They are orthogonal under S too, so their coherence is 0 and q* is 1 at every K, even at K = d with R² = 1: R² and
    q* mean nothing without sparsity.
    """
    return Basis(
        metric.eigenvectors.flip(1)[:, :k].T.float().contiguous(),
        mean_row(x).to(torch.promote_types(x.dtype, torch.float32)),
    )


register(
    Fixed(
        name="neurons",
        label="neurons",
        marker="P",
        line=":",
        make=lambda setup, k: neurons(setup.x),
    )
)
register(
    Fixed(
        name="principal",
        label="principal directions",
        marker="h",
        line=":",
        sparsity="l0",
        make=lambda setup, k: principal(setup.x, setup.aip, k),
    )
)
