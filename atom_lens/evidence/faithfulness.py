"""How much of the activations a code gives back (theory.md section 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.rows import Rows, mean_row


class SquaredSums:
    """Per row, what R² is made of: ||x - x_hat||² and ||x - mean(x)||², Euclidean and under `metric`.

    Rows come in the order of `x`, a batch at a time; `rows` then holds (residual, residual_aip, total, total_aip),
    each of shape (n,), float64, on the CPU.
    """

    def __init__(self, x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct | None) -> None:
        self.metric = metric
        self.mean: Float[Tensor, " d"] = mean_row(x)
        square = sum(float(rows.double().square().sum()) for rows in x.split(8192))
        total = sum(float((rows.double() - self.mean).square().sum()) for rows in x.split(8192))
        # Below the rounding of float32 activations the rows are one point, and there is no variance to explain.
        if total <= 1e-12 * square:
            raise ValueError(f"R² is undefined: all {len(x)} rows are the same")
        self._parts: list[list[Float[Tensor, " batch"]]] = [[], [], [], []]

    def update(self, x: Float[Tensor, "batch d"], x_hat: Float[Tensor, "batch d"]) -> None:
        """Add rows and their reconstructions."""
        differences = x.double() - x_hat.double(), x.double() - self.mean.to(x.device)
        for i, difference in enumerate(differences):
            self._parts[2 * i].append(difference.square().sum(dim=1).cpu())
            if self.metric is not None:
                self._parts[2 * i + 1].append((difference @ self.metric.sqrt).square().sum(dim=1).cpu())

    @property
    def rows(self) -> tuple[Float[Tensor, " n"], ...]:
        return tuple(torch.cat(parts) for parts in self._parts if parts)


def explained(residual: Float[Tensor, " n"], total: Float[Tensor, " n"]) -> float:
    """R², pooled over rows: 1 - residual / total."""
    return 1 - float(residual.sum() / total.sum())


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
    sums = SquaredSums(x, metric)
    for rows, reconstructions in zip(x.split(8192), x_hat.split(8192), strict=True):
        sums.update(rows, reconstructions)
    residual, total = sums.rows if metric is None else sums.rows[1::2]
    return explained(residual, total)
