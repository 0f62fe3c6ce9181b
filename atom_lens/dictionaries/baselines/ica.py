"""Independent components: the rotation of whitened activations that is least Gaussian (scikit-learn's FastICA)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.registry import Fixed, register
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row

_ROWS = 20_000
_ITERATIONS = 200


class Components:
    """Independent components with the k largest of an activation as its code, signs kept.

    As many as the width, so a control of what a complete dictionary reaches: orthogonal under the metric but for the
    mean, so its coherence is nearly 0 and its q* nearly 1.

    Args:
        x: training activations, shape (n, d); components are fitted to 20,000 of them at most.
        metric: the AIP.
        k: components of a code.
    """

    def __init__(self, x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct, k: int) -> None:
        from sklearn.decomposition import FastICA  # which takes longer to import than all else here
        from sklearn.exceptions import ConvergenceWarning

        self.k = k
        self.mean: Float[Tensor, " d"] = mean_row(x).float()
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_ROWS].to(x.device)
        whitened = metric.whiten(x[drawn].to(metric.eigenvalues) - mean_row(x).to(metric.eigenvalues))
        ica = FastICA(whiten="unit-variance", max_iter=_ITERATIONS, tol=1e-3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it has come as far as it is given time
            ica.fit(whitened.cpu().numpy().astype(np.float32))
        unmixing, mixing = (torch.from_numpy(part).to(metric.eigenvalues) for part in (ica.components_, ica.mixing_))
        self.W_dec: Float[Tensor, "k d"] = metric.unwhiten(mixing.T.contiguous()).float()
        self.W_enc: Float[Tensor, "d k"] = (metric.sqrt @ unmixing.T).float()

    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        codes = (x - self.mean) @ self.W_enc
        kept = codes.abs().topk(self.k, dim=1).indices
        return torch.zeros_like(codes).scatter_(1, kept, codes.gather(1, kept))

    def decode(self, feature_acts: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
        return feature_acts @ self.W_dec + self.mean


register(
    Fixed(
        name="ica",
        label="FastICA",
        role="baseline",
        color="#a0557a",
        marker="v",
        sparsity="l0",
        least=1.0,
        by_default=False,
        whole=False,
        make=lambda setup, k: Components(setup.x, setup.aip, k),
    )
)
