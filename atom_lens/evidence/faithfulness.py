"""How much of the activations a code gives back (theory.md section 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.geometry import AtomicInnerProduct, check_rows


class Residuals:
    """Streamed sums behind R²: residual and total sum of squares, in the Euclidean norm or under `metric`."""

    def __init__(self, width: int, metric: AtomicInnerProduct | None = None) -> None:
        self.metric = metric
        self.n = 0
        self.residual = 0.0
        self.square = 0.0
        self.total: Float[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)

    def update(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Residuals:
        """Add rows and their reconstructions."""
        x, x_hat = x.double(), x_hat.double()
        if self.metric is not None:
            x, x_hat = x @ self.metric.sqrt, x_hat @ self.metric.sqrt
        self.n += len(x)
        self.residual += float((x - x_hat).square().sum())
        self.square += float(x.square().sum())
        self.total += x.sum(dim=0).cpu()
        return self

    @property
    def r2(self) -> float:
        """1 - residual / total, the total taken around the mean of the rows seen."""
        total = self.square - float(self.total.square().sum()) / self.n
        # The two sums cancel: below their rounding the rows are one point, and there is no variance to explain.
        if total <= 1e-12 * self.square:
            raise ValueError(f"R² is undefined: all {self.n} rows are the same")
        return 1 - self.residual / total


def faithfulness(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "m e"], metric: AtomicInnerProduct | None = None
) -> float:
    """R² = 1 - sum ||x - x_hat||² / sum ||x - mean(x)||², pooled over rows (theory.md section 2).

    Args:
        x: activations, shape (n, d).
        x_hat: their reconstructions, shape (n, d).
        metric: None for the Euclidean norm (the paper's), or the AIP, in which every direction counts the same.

    Raises:
        ValueError: shapes differ, values are not finite, or all rows of `x` are equal.
    """
    check_rows(x, "x", None if metric is None else metric.width)
    check_rows(x_hat, "x_hat", x.shape[1])
    if len(x_hat) != len(x):
        raise ValueError(f"x_hat has {len(x_hat)} rows, expected {len(x)} as in x")
    sums = Residuals(x.shape[1], metric)
    for rows, reconstructions in zip(x.split(8192), x_hat.split(8192), strict=True):
        sums.update(rows, reconstructions)
    return sums.r2
