"""A pursuit in numpy, one row at a time, to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize


def drawn(n: int, d: int, f: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Rows and unit atoms, with much in common, so that coefficients do become negative."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(2, d, generator=generator, dtype=torch.float64)
    units = (
        torch.randn(f, d, generator=generator, dtype=torch.float64)
        + torch.randn(f, 2, generator=generator, dtype=torch.float64) @ shared
    )
    y = torch.randn(n, d, generator=generator, dtype=torch.float64) + shared.sum(0)
    return y.to(dtype), normalize(units).to(dtype)


def fitted(y: np.ndarray, units: np.ndarray, support: list[int]) -> np.ndarray:
    return np.linalg.lstsq(units[support].T, y, rcond=None)[0] if support else np.zeros(0)


def without_negative(
    y: np.ndarray, units: np.ndarray, support: list[int], start: np.ndarray
) -> tuple[list, np.ndarray]:
    """Lawson and Hanson's inner loop, with a solver at every step."""
    while True:
        values = fitted(y, units, support)
        if not len(values) or values.min() >= 0:
            return support, values
        steps = np.array([s / (s - v) if v < 0 else np.inf for s, v in zip(start, values, strict=True)])
        slot = int(steps.argmin())
        start = np.delete(np.maximum(start + steps[slot] * (values - start), 0), slot)
        support = [*support[:slot], *support[slot + 1 :]]


def reference(
    y: np.ndarray, units: np.ndarray, most: int, tau: np.ndarray, signed: bool, nonnegative: bool, prune: bool
) -> tuple[np.ndarray, float]:
    """The dense code of one row, and by how much its closest decision was decided."""
    support: list[int] = []
    values, closest = np.zeros(0), np.inf
    for _ in range(most):
        correlation = units @ (y - values @ units[support])
        strength = np.abs(correlation) if signed else correlation.copy()
        strength[support] = -np.inf
        free = strength[np.isfinite(strength)]
        closest = min(closest, np.abs(free - tau[np.isfinite(strength)]).min(initial=np.inf), free.max(initial=np.inf))
        strength[strength < tau] = -np.inf
        new = int(strength.argmax())
        if strength[new] <= 1e-12:
            break
        second = np.delete(strength, new).max(initial=-np.inf)
        closest = min(closest, strength[new] - second)
        support, start = [*support, new], np.append(values, 0.0)
        values = fitted(y, units, support)
        closest = min(closest, np.abs(values).min())
        if nonnegative:
            support, values = without_negative(y, units, support, start)
    while prune and support:
        error = ((y - values @ units[support]) ** 2).sum()
        rests = [[a for a in support if a != one] for one in support]
        raised = np.array([((y - fitted(y, units, rest) @ units[rest]) ** 2).sum() - error for rest in rests])
        gain = raised - tau[support] ** 2
        closest = min(closest, np.abs(gain).min(), np.diff(np.sort(gain)).min(initial=np.inf))
        slot = int(gain.argmin())
        if gain[slot] >= 0:
            break
        start, support = np.delete(values, slot), rests[slot]
        values = fitted(y, units, support)
        if nonnegative:
            support, values = without_negative(y, units, support, start)
    code = np.zeros(len(units))
    code[support] = values
    return code, closest
