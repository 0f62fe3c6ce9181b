"""How much of the activations a code gives back (theory.md section 2)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.tensors.rows import Rows, mean_row


class SquaredSums:
    """Per row, what R² is made of: ||x - x_hat||² and ||x - mean(x)||², Euclidean and under `metric`.

    `rows` holds (residual, residual_aip, total, total_aip), each of shape (n,), float64, on the device of the metric;
    rows that were not given are zero.
    """

    def __init__(self, x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct | None) -> None:
        self.metric = metric
        self.mean: Float[Tensor, " d"] = mean_row(x)
        square = sum(float(rows.double().square().sum()) for rows in x.split(8192))
        total = sum(float((rows.double() - self.mean).square().sum()) for rows in x.split(8192))
        # Below the rounding of float32 activations the rows are one point, and there is no variance to explain.
        if total <= 1e-12 * square:
            raise AtomLensError(f"R² is undefined: all {len(x)} rows are the same")
        device = x.device if metric is None else metric.eigenvalues.device
        self.rows: Float[Tensor, "4 n"] = torch.zeros(4, len(x), dtype=torch.float64, device=device)

    def update(self, start: int, x: Float[Tensor, "batch d"], x_hat: Float[Tensor, "batch d"]) -> None:
        """Take in the rows from `start` on, and their reconstructions."""
        differences = x.double() - x_hat.double(), x.double() - self.mean.to(x.device)
        for i, difference in enumerate(differences):
            self.rows[2 * i, start : start + len(x)] = difference.square().sum(dim=1)
            if self.metric is not None:
                whitened = difference @ self.metric.sqrt
                self.rows[2 * i + 1, start : start + len(x)] = whitened.square().sum(dim=1)


def explained(residual: Float[Tensor, " n"], total: Float[Tensor, " n"]) -> float:
    """R², pooled over rows: 1 - residual / total."""
    return 1 - float(residual.sum() / total.sum())


@torch.no_grad()
def faithfulness(
    x: Float[Tensor | np.ndarray, "n d"],
    x_hat: Float[Tensor | np.ndarray, "m e"],
    metric: AtomicInnerProduct | None = None,
) -> float:
    """R² = 1 - sum ||x - x_hat||² / sum ||x - mean(x)||², pooled over rows (theory.md section 2).

    Args:
        x: activations, shape (n, d).
        x_hat: their reconstructions, shape (n, d).
        metric: None for the Euclidean norm (the paper's), or the AIP, in which every direction counts the same.

    Raises:
        AtomLensError: shapes differ, values are not finite, or all rows of `x` are equal.
    """
    x = check_rows(x, "x", None if metric is None else metric.width)
    x_hat = check_rows(x_hat, "x_hat", x.shape[1])
    if len(x_hat) != len(x):
        raise AtomLensError(f"x_hat has {len(x_hat)} rows, expected {len(x)} as in x")
    sums = SquaredSums(x, metric)
    for start in range(0, len(x), 8192):
        sums.update(start, x[start : start + 8192], x_hat[start : start + 8192])
    residual, total = sums.rows[::2] if metric is None else sums.rows[1::2]
    return explained(residual, total)
