"""Products over the few entries of a code that matter: the training step without its dense backward pass.

Of the gradients of a threshold SAE, only active entries and those inside the straight-through window are not zero. The
encoder's forward product has to be dense, to find them; everything after it is sparse (docs/performance.md).
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor
from torch.nn.functional import embedding_bag
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
    def where(cls, mask: Bool[Tensor, "batch F"] | Int16[Tensor, "batch F"]) -> Entries:
        """The places at which `mask` is not zero."""
        rows, columns = _nonzero(mask)
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

    def times(self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "F d"]) -> Float[Tensor, "batch d"]:
        """The sparse matrix of `values`, times `dense`."""
        return _sums(self.columns, self.row_starts, values, dense)

    def transposed_times(self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "batch d"]) -> Float[Tensor, "F d"]:
        """The same matrix transposed, times `dense`."""
        return _sums(self.rows[self.by_column], self.column_starts, values[self.by_column], dense)


def _nonzero(mask: Bool[Tensor, "batch F"] | Int16[Tensor, "batch F"]) -> tuple[Tensor, Tensor]:
    """Rows and columns; on a CPU by words of 8 bytes first: most are empty, which makes it four times faster."""
    width, together = mask.shape[1], 8 // mask.itemsize
    if mask.is_cuda or width % together:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    words = mask.view(torch.int64).flatten().nonzero()[:, 0]
    word, within = mask.view(-1, together)[words].nonzero(as_tuple=True)
    place = words[word] * together + within
    return place // width, place % width


def _starts(index: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " starts"]:
    # Not by bincount, for which a GPU is waited for twice.
    return index.new_zeros(size + 1).index_add_(0, index + 1, torch.ones_like(index)).cumsum(0)


def _sums(
    index: Int[Tensor, " nnz"],
    starts: Int[Tensor, " starts"],
    values: Float[Tensor, " nnz"],
    dense: Float[Tensor, "n d"],
) -> Float[Tensor, "rows d"]:
    """Sums of rows `index` of `dense`, times `values`, one sum from each start to the next.

    Always in this order, where sparse products of torch add up on a GPU as they come, to other bits each time.
    """
    return embedding_bag(index, dense, starts, mode="sum", per_sample_weights=values, include_last_offset=True)


class _Decode(torch.autograd.Function):
    """values (nnz) at entries, times atoms (F, d): (batch, d)."""

    @staticmethod
    @override
    def forward(ctx: Any, values: Tensor, atoms: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values, atoms)
        ctx.entries = entries
        return entries.times(values, atoms)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        values, atoms = ctx.saved_tensors
        entries: Entries = ctx.entries
        sampled = sampled_product(grad, atoms, entries)
        needed = ctx.needs_input_grad[1]
        return sampled, entries.transposed_times(values, grad) if needed else None, None


class _Encode(torch.autograd.Function):
    """Entries of x (batch, d) times directionsᵀ (F, d), plus biases, which were computed before: (nnz)."""

    @staticmethod
    @override
    def forward(
        ctx: Any, found: Tensor, x: Tensor, directions: Tensor, b_enc: Tensor, b_dec: Tensor | None, entries: Entries
    ) -> Tensor:
        ctx.save_for_backward(x, directions)
        ctx.entries = entries
        return found.clone()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor | None, Tensor, Tensor | None, None]:
        (grad,) = grads
        x, directions = ctx.saved_tensors
        entries: Entries = ctx.entries
        _, _, for_directions, _, for_b_dec, _ = ctx.needs_input_grad
        columns = entries.transposed_times(grad, grad.new_ones(len(x), 1))[:, 0]
        return (
            None,
            None,
            entries.transposed_times(grad, x) if for_directions else None,
            columns,
            # b_dec acts on every entry of a column alike: a product with a vector, not with a matrix.
            -(directions.T @ columns) if for_b_dec else None,
            None,
        )


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
    found: Float[Tensor, " nnz"],
    x: Float[Tensor, "batch d"],
    directions: Float[Tensor, "F d"],
    b_enc: Float[Tensor, " F"],
    b_dec: Float[Tensor, " d"] | None,
    entries: Entries,
) -> Float[Tensor, " nnz"]:
    """`found`, the `entries` of x directionsᵀ + b_enc, with the gradients of `directions` and biases.

    x is data and has none; where it is what is left over `b_dec`, that has one.
    """
    return _Encode.apply(found, x, directions, b_enc, b_dec, entries)
