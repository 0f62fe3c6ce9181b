"""Products over the few entries of a code that matter: the training step without its dense backward pass.

Of the gradients of a threshold SAE, only active entries and those inside the straight-through window are not zero. The
encoder's forward product has to be dense, to find them; everything after it is sparse (docs/performance.md).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

with warnings.catch_warnings():
    # torch says once that compressed rows are beta; tests hold them against dense products.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


class Entries(NamedTuple):
    """Places in a (batch, F) matrix, in the order of rows, and what it takes to go through them by columns."""

    rows: Int[Tensor, " nnz"]
    columns: Int[Tensor, " nnz"]
    row_starts: Int[Tensor, " rows"]
    column_starts: Int[Tensor, " columns"]
    by_column: Int[Tensor, " nnz"]

    @classmethod
    def where(cls, mask: Bool[Tensor, "batch F"]) -> Entries:
        """The places at which `mask` is true."""
        rows, columns = mask.nonzero(as_tuple=True)
        return cls(
            rows,
            columns,
            _starts(rows, mask.shape[0]),
            _starts(columns, mask.shape[1]),
            torch.argsort(columns, stable=True),
        )

    def matrix(self, values: Float[Tensor, " nnz"]) -> Tensor:
        """Sparse, (batch, F), in compressed rows."""
        size = (len(self.row_starts) - 1, len(self.column_starts) - 1)
        return torch.sparse_csr_tensor(self.row_starts, self.columns, values, size, check_invariants=False)

    def transposed(self, values: Float[Tensor, " nnz"]) -> Tensor:
        """Sparse, (F, batch), in compressed rows."""
        size = (len(self.column_starts) - 1, len(self.row_starts) - 1)
        order = self.by_column
        return torch.sparse_csr_tensor(
            self.column_starts, self.rows[order], values[order], size, check_invariants=False
        )


def _starts(index: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " starts"]:
    counts = torch.bincount(index, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _product(sparse: Tensor, dense: Float[Tensor, "inner d"]) -> Float[Tensor, "rows d"]:
    """sparse dense. The operator @ fills a matrix with zeros, copies it, adds, and copies: ten times slower."""
    nothing = dense.new_zeros(1, 1).expand(sparse.shape[0], dense.shape[1])
    return torch.addmm(nothing, sparse, dense, beta=0)


class _Decode(torch.autograd.Function):
    """values (nnz) at entries, times atoms (F, d): (batch, d)."""

    @staticmethod
    @override
    def forward(ctx: Any, values: Tensor, atoms: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values, atoms)
        ctx.entries = entries
        return _product(entries.matrix(values), atoms)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        values, atoms = ctx.saved_tensors
        entries: Entries = ctx.entries
        sampled = sampled_product(grad, atoms, entries)
        needed = ctx.needs_input_grad[1]
        return sampled, _product(entries.transposed(values), grad) if needed else None, None


class _Encode(torch.autograd.Function):
    """Entries of x (batch, d) times directionsᵀ (F, d), which were computed before: (nnz)."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, directions: Tensor, found: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(x)
        ctx.entries = entries
        return found.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        return None, _product(ctx.entries.transposed(grads[0]), x) if needed else None, None, None


def sampled_product(
    left: Float[Tensor, "batch d"], right: Float[Tensor, "F d"], entries: Entries
) -> Float[Tensor, " nnz"]:
    """The `entries` of left rightᵀ, and no others; no gradient."""
    pattern = entries.matrix(left.new_zeros(len(entries.rows)))
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def sparse_decode(
    values: Float[Tensor, " nnz"], atoms: Float[Tensor, "F d"], entries: Entries
) -> Float[Tensor, "batch d"]:
    """Codes that are zero but for `values` at `entries`, times `atoms`."""
    return _Decode.apply(values, atoms, entries)


def sparse_encode(
    x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"], found: Float[Tensor, " nnz"], entries: Entries
) -> Float[Tensor, " nnz"]:
    """`found`, which are the `entries` of x directionsᵀ, with the gradient of `directions`; x is data and has none."""
    return _Encode.apply(x, directions, found, entries)


def upper_product(x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"]) -> Float[Tensor, "batch F"]:
    """x directionsᵀ from bfloat16 factors, raised by all that rounding can have taken: never below the true product.

    Rounding both factors to 8 bits moves a product by at most 2⁻⁷ |x| |w| (Cauchy-Schwarz), rounding the result by
    2⁻⁸ |x| |w|; a tenth is added for what is of second order.
    """
    slack = 1.1 * (2**-7 + 2**-8) * x.norm(dim=1, keepdim=True) * directions.norm(dim=1).max()
    return (x.bfloat16() @ directions.bfloat16().T).to(x.dtype).add_(slack)
