"""The fast training step: it works on the few entries of a code that matter, without a dense backward pass.

Gradients of a threshold SAE are zero except at active entries and inside the straight-through window. The encoder's
forward product has to be dense, to find those entries (`search`); everything after it is sparse (docs/training.md).
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from torch import Tensor
from torch.nn.functional import embedding_bag
from typing_extensions import override

if TYPE_CHECKING:
    from atom_lens.dictionaries.tsae.training import TSAETraining

_REVIVED = 64  # dead atoms that are active at once in the revival loss

with warnings.catch_warnings():
    # torch warns once that compressed rows are beta; tests compare them with dense products.
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))


class Read(NamedTuple):
    """A batch, encoded and decoded: what the loss is made of, and the codes and pre-activations behind it."""

    out: Float[Tensor, "batch d"]
    l0: Float[Tensor, " batch"]  # active atoms, with the straight-through gradient
    codes: Tensor
    pre: Tensor
    revived: Float[Tensor, "batch d"] | None = None  # what the strongest dead atoms would add


def strongest(candidates: Float[Tensor, "batch dead"]) -> torch.return_types.topk:
    """The largest pre-activations of dead atoms."""
    return candidates.topk(min(_REVIVED, candidates.shape[1]), dim=1)


def read_sparsely(sae: TSAETraining, y: Float[Tensor, "batch d"], dead: Bool[Tensor, " F"] | None) -> Read:
    """What a dense step computes from `y`, with gradients only at the entries where they are not zero.

    `Read.codes` and `Read.pre` are sparse: the first has active entries, the second all entries that were visited.
    """
    directions = sae.W_dec if sae.cfg.encoder == "tied" else sae.W_enc.T
    with torch.no_grad():
        seen = sae.process_sae_in(y)
        cutoff = sae.threshold - sae.bandwidth / 2 - sae.b_enc  # adding b_enc would copy a matrix
        entries, found = search(seen, directions, cutoff.to(seen), sae.cfg.encoder_product)
        found = found + sae.b_enc[entries.columns]

    def pre(found: Tensor, at: Entries) -> Tensor:
        b_dec = sae.b_dec if sae.cfg.apply_b_dec_to_input else None
        return sparse_encode(found, seen, directions, sae.b_enc, b_dec, at)

    # sae-lens' own estimators, on the entries in a row instead of the whole matrix.
    values, threshold = pre(found, entries)[None], sae.threshold.to(found)[entries.columns]
    estimator = (threshold, sae.bandwidth, sae.cfg.jumprelu_ste_to_input)
    codes = JumpReLU.apply(values, *estimator)[0]
    active = Step.apply(values, *estimator)[0]
    l0 = active.new_zeros(len(y)).index_add(0, entries.rows, active)
    out = sparse_decode(codes, sae.W_dec, entries) + sae.b_dec
    places, size = torch.stack([entries.rows, entries.columns]), (len(y), sae.cfg.d_sae)
    fired = codes.detach() > 0
    feature_acts = torch.sparse_coo_tensor(places[:, fired], codes.detach()[fired], size, is_coalesced=True)
    hidden_pre = torch.sparse_coo_tensor(places, found, size, is_coalesced=True)
    if dead is None:
        return Read(out, l0, feature_acts, hidden_pre)
    at, candidates = _revived(seen, directions, sae.b_enc, dead)
    return Read(out, l0, feature_acts, hidden_pre, sparse_decode(pre(candidates, at), sae.W_dec, at))


@torch.no_grad()
def _revived(seen: Tensor, directions: Tensor, b_enc: Tensor, dead: Tensor) -> tuple[Entries, Tensor]:
    """Where the strongest dead atoms would be active, and their pre-activations there."""
    index = dead.nonzero()[:, 0]
    found = torch.addmm(b_enc[index], seen, directions[index].T)
    mask = torch.zeros(len(seen), len(dead), dtype=torch.bool, device=seen.device)
    places = strongest(found)
    mask[torch.arange(len(seen), device=seen.device)[:, None], index[places.indices]] = places.values > 0
    at = Entries.where(mask)
    column = torch.empty_like(dead, dtype=torch.long)
    column[index] = torch.arange(len(index), device=index.device)
    return at, found[at.rows, column[at.columns]]


@torch.no_grad()
def search(
    x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"], cutoff: Float[Tensor, " F"], precision: str
) -> tuple[Entries, Float[Tensor, " nnz"]]:
    """All entries of x directionsᵀ above `cutoff`, and their values.

    With "bfloat16" the product has that precision, and some entries just below the cutoff are found as well; values
    still have the precision of the weights.
    """
    if precision == "bfloat16":
        left, right = _bounds(x, directions, cutoff)
        entries = Entries.where(left @ right.T > 0)
        return entries, sampled_product(x, directions, entries)
    product = x @ directions.T
    entries = Entries.where(product > cutoff)
    return entries, product[entries.rows, entries.columns]


def _bounds(
    x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"], cutoff: Float[Tensor, " F"]
) -> tuple[BFloat16[Tensor, "batch wide"], BFloat16[Tensor, "F wide"]]:
    """Factors of a product that is above zero wherever x directionsᵀ is above `cutoff`, despite rounding.

    With x = x^ + dx and w = w^ + dw, where x^ and w^ have 8 bits, x w - x^ w^ is at most |dx| |w| + |x^| |dw|
    (Cauchy-Schwarz), |dw| at most 2⁻⁸ |w|, and sums in float32 are off by at most 2⁻²³ d |x^| |w| in any order.
    A GPU may round partial sums to 8 bits as well. This margin and the cutoff (in two parts of 8 bits) take three
    more columns.
    """
    d = x.shape[1]
    wide = 16 * math.ceil((d + 3) / 16)
    above = 1 + 2**-7  # so that rounding never lowers a bound
    sums = 2**-23 * d + (2**-7 if x.is_cuda else 0)
    rounded = x.bfloat16()
    left = rounded.new_zeros(len(x), wide)
    left[:, :d] = rounded
    left[:, d] = above * ((x - rounded).norm(dim=1) + (2**-8 + sums) * rounded.to(x).norm(dim=1))
    left[:, d + 1 : d + 3] = 1
    right = left.new_zeros(len(directions), wide)
    right[:, :d] = directions
    right[:, d] = above * directions.norm(dim=1)
    below = -(cutoff - (2**-15 + sums) * cutoff.abs())
    right[:, d + 1] = below
    right[:, d + 2] = below - right[:, d + 1]
    return left, right


class Entries(NamedTuple):
    """Places in a (batch, F) matrix, in the order of rows, and what is needed to visit them by columns."""

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

    def times(self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "F d"]) -> Float[Tensor, "batch d"]:
        """The sparse matrix of `values`, times `dense`."""
        return _sums(self.columns, self.row_starts, values, dense)

    def transposed_times(self, values: Float[Tensor, " nnz"], dense: Float[Tensor, "batch d"]) -> Float[Tensor, "F d"]:
        """The same matrix transposed, times `dense`."""
        return _sums(self.rows[self.by_column], self.column_starts, values[self.by_column], dense)


def _starts(index: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " starts"]:
    # Not by bincount, which waits for a GPU twice.
    return index.new_zeros(size + 1).index_add_(0, index + 1, torch.ones_like(index)).cumsum(0)


def _sums(
    index: Int[Tensor, " nnz"],
    starts: Int[Tensor, " starts"],
    values: Float[Tensor, " nnz"],
    dense: Float[Tensor, "n d"],
) -> Float[Tensor, "rows d"]:
    """Sums of rows `index` of `dense`, times `values`, one sum from each start to the next.

    The order is fixed: torch's sparse products on a GPU add in any order and give different bits each time.
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
    """Precomputed entries of x (batch, d) times directionsᵀ (F, d), plus biases: (nnz)."""

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
            # b_dec acts equally on every entry of a column: a product with a vector, not with a matrix.
            -(directions.T @ columns) if for_b_dec else None,
            None,
        )


def sampled_product(
    left: Float[Tensor, "batch d"], right: Float[Tensor, "F d"], entries: Entries
) -> Float[Tensor, " nnz"]:
    """Only the `entries` of left rightᵀ; no gradient."""
    pattern = entries.matrix(left.new_zeros(len(entries.rows)))
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def sparse_decode(
    values: Float[Tensor, " nnz"], atoms: Float[Tensor, "F d"], entries: Entries
) -> Float[Tensor, "batch d"]:
    """Codes that are zero except for `values` at `entries`, times `atoms`."""
    return _Decode.apply(values, atoms, entries)


def sparse_encode(
    found: Float[Tensor, " nnz"],
    x: Float[Tensor, "batch d"],
    directions: Float[Tensor, "F d"],
    b_enc: Float[Tensor, " F"],
    b_dec: Float[Tensor, " d"] | None,
    entries: Entries,
) -> Float[Tensor, " nnz"]:
    """`found`, the `entries` of x directionsᵀ + b_enc, with gradients for `directions` and biases.

    x is data and has none; where `b_dec` was subtracted from it, `b_dec` has one.
    """
    return _Encode.apply(found, x, directions, b_enc, b_dec, entries)
