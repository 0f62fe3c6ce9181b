"""Where pre-activations of a batch may reach a cutoff: the dense product of a sparse training step.

Few entries do, so what is to be saved beside the product is going over its memory (docs/performance.md).
"""

from __future__ import annotations

import math
import threading
from typing import Literal
from weakref import WeakValueDictionary

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from atom_lens.dictionaries.tsae.sparse import Entries, sampled_product

_SHARED: WeakValueDictionary[tuple[str, torch.Size, torch.dtype, torch.device, int], Tensor] = WeakValueDictionary()


class Search:
    """Finds entries of x directionsᵀ, and keeps the memory that takes for the next time.

    Memory of this size is given back to the system when it is freed, and taken anew page by page: a tenth of a step.
    Searches of one shape share it within a thread, where only one goes on at a time.
    """

    def __init__(self, precision: Literal["float32", "bfloat16"]) -> None:
        self.precision = precision
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"], cutoff: Float[Tensor, " F"]
    ) -> tuple[Entries, Float[Tensor, " nnz"]]:
        """All entries of x directionsᵀ above `cutoff`, and their values. In bfloat16 some more that are just below."""
        size = torch.Size((len(x), len(directions)))
        if self.precision == "float32":
            product = self._memory("product", size, x)
            torch.mm(x, directions.T, out=product)
            entries = Entries.where(product > cutoff)
            return entries, product[entries.rows, entries.columns]
        left, right = self._bounds(x, directions, cutoff)
        product = self._memory("product", size, left)
        torch.mm(left, right.T, out=product)
        # The bits of a positive number are a positive integer; two passes less than comparing.
        entries = Entries.where(product.view(torch.int16).clamp_(min=0))
        return entries, sampled_product(x, directions, entries)

    def _bounds(
        self, x: Float[Tensor, "batch d"], directions: Float[Tensor, "F d"], cutoff: Float[Tensor, " F"]
    ) -> tuple[BFloat16[Tensor, "batch wide"], BFloat16[Tensor, "F wide"]]:
        """Factors of a product that is above zero wherever x directionsᵀ is above `cutoff`, whatever rounding takes.

        With x = x^ + dx and w = w^ + dw, of which x^ and w^ have 8 bits, x w - x^ w^ is at most |dx| |w| + |x^| |dw|
        (Cauchy-Schwarz), |dw| at most 2⁻⁸ |w|, and sums in float32 are off by at most 2⁻²³ d |x^| |w| in any order.
        A GPU may round partial sums to 8 bits as well. This margin and the cutoff (in two parts, 16 bits) are three
        columns more.
        """
        d = x.shape[1]
        wide = 16 * math.ceil((d + 3) / 16)
        above = 1 + 2**-7  # of what it is rounded from
        sums = 2**-23 * d + (2**-7 if x.is_cuda else 0)
        rounded = x.bfloat16()
        left = rounded.new_zeros(len(x), wide)
        left[:, :d] = rounded
        left[:, d] = above * ((x - rounded).norm(dim=1) + (2**-8 + sums) * rounded.to(x).norm(dim=1))
        left[:, d + 1 : d + 3] = 1
        right = self._memory("directions", torch.Size((len(directions), wide)), left)
        right[:, :d] = directions
        right[:, d] = above * directions.norm(dim=1)
        below = -(cutoff - (2**-15 + sums) * cutoff.abs())
        right[:, d + 1] = below
        right[:, d + 2] = below - right[:, d + 1]
        right[:, d + 3 :] = 0
        return left, right

    def _memory(self, name: str, size: torch.Size, like: Tensor) -> Tensor:
        key = (name, size, like.dtype, like.device, threading.get_ident())
        found = _SHARED.get(key)
        if found is None:
            found = _SHARED[key] = like.new_empty(size)
        self._kept[name] = found
        return found
