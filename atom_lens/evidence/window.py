"""The threshold window of the identifiability theorem (theory.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ThresholdWindow:
    """Where each threshold lies in eps K delta_max < tau < delta_min - eps (K - 1) delta_max. Shape (F,) each.

    All are in units of coefficients of atoms of unit AIP norm (theory.md section 3); the inequalities are strict.
    """

    lower: Float[Tensor, " F"]
    upper: Float[Tensor, " F"]
    tau: Float[Tensor, " F"]

    @property
    def feasible(self) -> Bool[Tensor, " F"]:
        """Whether any threshold satisfies both sides."""
        return self.lower < self.upper

    @property
    def inside(self) -> Bool[Tensor, " F"]:
        return (self.lower < self.tau) & (self.tau < self.upper)

    @property
    def outside_by(self) -> Float[Tensor, " F"]:
        """How far tau is from satisfying both sides: the larger shortfall, 0 where it is inside."""
        return torch.maximum(self.lower - self.tau, self.tau - self.upper).clamp(min=0)


def threshold_window(
    tau: Float[Tensor, " F"],
    eps: Float[Tensor, " F"],
    k: Int[Tensor, " F"],
    k_active: Int[Tensor, " F"],
    delta_min: Float[Tensor, " F"],
    delta_max: float,
) -> ThresholdWindow:
    """The window of the identifiability theorem, per atom.

    Args:
        tau: thresholds.
        eps: coherence bound of each atom.
        k: largest L0 of any code (a silent atom correlates with this many others).
        k_active: largest L0 of a code in which the atom is active (it correlates with one fewer).
        delta_min: smallest coefficient of the atom.
        delta_max: largest coefficient of any atom.
    """
    return ThresholdWindow(eps * k * delta_max, delta_min - eps * (k_active - 1) * delta_max, tau)
