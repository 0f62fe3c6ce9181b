"""Rows of activations that need not fit into memory: a file is mapped, and only the rows asked for are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows:
    """Some rows of a matrix, in some order, optionally through a linear map; no row is copied before it is read.

    Takes the place of activations (n, d) wherever they are only read in parts: ``len``, `shape`, `split`, ``rows[i]``.

    Args:
        matrix: all rows, shape (N, e); often mapped from a file.
        index: which of them, in which order, shape (n,); None is all.
        map: applied in float64 to what is read, shape (e, d); None leaves rows as they are.
        dtype: of what is read; None keeps that of the matrix.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "N e"],
        index: Int[Tensor, " n"] | None = None,
        map: Float[Tensor, "e d"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.matrix, self.index, self.map, self.dtype = matrix, index, map, dtype or matrix.dtype

    @property
    def shape(self) -> torch.Size:
        """(n, d)."""
        return torch.Size([len(self), (self.matrix if self.map is None else self.map).shape[1]])

    @property
    def ndim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def __len__(self) -> int:
        return len(self.matrix if self.index is None else self.index)

    def __getitem__(self, at: slice | Int[Tensor, " m"] | Bool[Tensor, " n"]) -> Float[Tensor, "m d"]:
        rows = self.matrix[at] if self.index is None else self.matrix[self.index[at]]
        return (rows if self.map is None else rows.double() @ self.map.to(rows.device)).to(self.dtype)

    def split(self, size: int) -> Iterator[Float[Tensor, "m d"]]:
        """All rows, `size` at a time, as `torch.split`."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def select(self, which: Int[Tensor, " m"] | Bool[Tensor, " n"]) -> Rows:
        """Some of these rows."""
        index = torch.arange(len(self)) if self.index is None else self.index
        return Rows(self.matrix, index[which], self.map, self.dtype)

    def through(self, map: Float[Tensor, "d f"]) -> Rows:
        """These rows times a matrix."""
        return Rows(self.matrix, self.index, map if self.map is None else self.map @ map, self.dtype)


def float32_rows(x: Float[Tensor | Rows, "n d"]) -> Rows:
    """The same rows, read as float32."""
    return Rows(x.matrix, x.index, x.map, torch.float32) if isinstance(x, Rows) else Rows(x, dtype=torch.float32)


def mean_row(x: Float[Tensor | Rows, "n d"]) -> Float[Tensor, " d"]:
    """The mean of all rows, float64."""
    return torch.stack([rows.double().sum(dim=0) for rows in x.split(8192)]).sum(dim=0) / len(x)


def scratch(n: int, width: int) -> Float[Tensor, "n width"]:
    """An empty float32 matrix on disk, in an unnamed file that disappears with the tensor."""
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(n, width)))
