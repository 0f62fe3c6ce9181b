"""Recovery: do sparse solvers that know only the atoms find the encoder's codes? (theory.md section 2)"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path
from torch import Tensor

from atom_lens.dictionaries.pursuit.omp import pursue


def pursuit_agrees(
    signals: Float[Tensor, "n d"], units: Float[Tensor, "F d"], active: Bool[Tensor, "n F"]
) -> Float[Tensor, " n"]:
    """Share of each support that orthogonal matching pursuit also finds, given the number of active atoms.

    Args:
        signals: whitened activations or reconstructions less the decoder bias, shape (n, d).
        units: whitened unit atoms, shape (F, d).
        active: supports, shape (n, F), each with at least one atom.
    """
    sizes = active.sum(dim=1)
    codes = pursue(signals, units, most=int(sizes.max()), signed=True, nonnegative=False)
    # A pursuit of fewer atoms is the start of a longer one.
    within = torch.arange(codes.support.shape[1], device=sizes.device) < torch.minimum(sizes, codes.count)[:, None]
    return ((active.gather(1, codes.support) & within).sum(dim=1).double() / sizes).cpu()


def basis_pursuit_agrees(
    signals: Float[Tensor, "n d"], units: Float[Tensor, "F d"], active: Bool[Tensor, "n F"], steps: int | None = None
) -> Float[Tensor, " n"]:
    """Share of each support among the largest coefficients of the l1-minimal code (scikit-learn's LARS).

    Where the signals lie in the span of their supports (reconstructions), the path ends at the exact code of smallest
    l1 norm. The path of signals with noise (activations) has no such end and is cut after `steps` times the size of the
    support.
    """
    columns = units.T.double().cpu().numpy()
    agreement = torch.zeros(len(signals), dtype=torch.float64)
    for row, signal in enumerate(signals.double().cpu().numpy()):
        size = int(active[row].sum())
        end = 1e-6 * float(np.abs(signal @ columns).max()) / len(signal)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the path ends early once nothing is left over
            # Without a Gram matrix, which would be F x F.
            _, _, path = lars_path(
                columns,
                signal,
                method="lasso",
                alpha_min=end,  # pyright: ignore[reportArgumentType]
                max_iter=500 if steps is None else steps * size,
                Gram=None,  # pyright: ignore[reportArgumentType]
            )
        largest = torch.from_numpy(np.abs(path[:, -1]).argsort()[-size:].copy())
        agreement[row] = active[row, largest.to(active.device)].double().mean()
    return agreement
