"""The codes of many activations by latent: at which rows each is active, and how strongly."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.tensors.rows import Rows


@torch.no_grad()
def codes_of(dictionary: Dictionary, x: Float[Tensor | Rows, "n d"], batch: int = 1024) -> csc_array:
    """The codes of `x`, shape (n, F), by column: the rows at which a latent is active, and its coefficients there."""
    rows, columns, values = [], [], []
    for start in range(0, len(x), batch):
        codes = dictionary.encode(x[start : start + batch].to(dictionary.W_dec.device)).cpu()
        row, column = codes.nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
        values.append(codes[row, column].float())
    at = tuple(torch.cat(part).numpy() for part in (rows, columns))
    return csc_array((torch.cat(values).numpy(), at), shape=(len(x), len(dictionary.W_dec)))


def active_rows(codes: csc_array, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows at which `latent` is active and its coefficients there, largest in magnitude first."""
    rows = codes.indices[codes.indptr[latent] : codes.indptr[latent + 1]]
    values = codes.data[codes.indptr[latent] : codes.indptr[latent + 1]]
    order = np.argsort(-np.abs(values), kind="stable")
    return rows[order], values[order]
