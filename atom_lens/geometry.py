"""The atomic inner product: the metric in which atoms are compared.

``C = E[x xᵀ]`` is accumulated from activations, ``S = C⁻¹`` is the metric, and ``<u, v>_S = uᵀSv``. Whitening
with ``S^{1/2}`` turns it into the ordinary inner product (theory.md section 1; arXiv 2509.20784).

Uses torch only, runs on any device, and takes plain tensors, so it can be used on anybody's dictionary.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import parse_json, regular_file, replacing, shown
from atom_lens.tensors import parallel
from atom_lens.tensors.checks import matrix
from atom_lens.tensors.rows import Rows
from atom_lens.tensors.tiles import over_tiles, pairs_of

Ridge = float | Literal["oas"]
# Held-out Gaussian likelihood of the demo model's activations is best near this (docs/training.md).
DEFAULT_RIDGE = 1e-4
_FORMAT = "atom_lens.aip.1"
_CHUNK = 8192  # rows held in float64


@overload
def check_rows(x: Tensor | np.ndarray, name: str, width: int | None = None) -> Tensor: ...
@overload
def check_rows(x: Tensor | Rows | np.ndarray, name: str, width: int | None = None) -> Tensor | Rows: ...
def check_rows(x: Any, name: str, width: int | None = None) -> Tensor | Rows:
    """`x` as a matrix of rows, numpy arrays as tensors; an AtomLensError says what is wrong with it, and where."""
    x = matrix(x, name)
    if x.shape[0] == 0:
        raise AtomLensError(f"{name} is empty: it has 0 rows of width {x.shape[1]}")
    if width is not None and x.shape[1] != width:
        raise AtomLensError(f"{name} has width {x.shape[1]}, expected {width}")
    bad = torch.cat([~torch.isfinite(rows).all(dim=1) for rows in x.split(8192)])
    if bad.any():
        first = int(bad.nonzero()[0])
        raise AtomLensError(f"{name} has {int(bad.sum())} rows with NaN or infinite values, the first is row {first}")
    return x


class SecondMoment:
    """Streamed, mergeable ``sum x xᵀ`` in float64 (uncentred: the mean of the activations is part of it)."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.total: Float[Tensor, "d d"] = torch.zeros(width, width, dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        return self.total.shape[0]

    @property
    def matrix(self) -> Float[Tensor, "d d"]:
        """C, shape (d, d), float64."""
        if self.n == 0:
            raise AtomLensError("the second moment is empty: no rows were added")
        return self.total / self.n

    @torch.no_grad()
    def update(self, x: Float[Tensor | Rows | np.ndarray, "n d"]) -> SecondMoment:
        """Add the rows of `x`, in chunks so that no float64 copy of all of `x` is made."""
        x = check_rows(x, "x", self.width)
        for part in parallel.in_order(range(0, len(x), _CHUNK), lambda start: self._of(x[start : start + _CHUNK])):
            self.total += part
        self.n += len(x)
        return self

    def _of(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
        rows = x.to(self.total.device, torch.float64)
        return rows.T @ rows

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add what `other` has seen, as if its rows had been given to this one."""
        if other.width != self.width:
            raise AtomLensError(f"cannot merge second moments of width {other.width} and {self.width}")
        self.total += other.total.to(self.total.device)
        self.n += other.n
        return self


def oas_ridge(c: Float[Tensor, "d d"], n: int) -> float:
    """Oracle approximating shrinkage (Chen et al. 2010, assumed centred) as a relative ridge.

    Shrinking to ``(1-s) C + s tr(C)/d I`` equals, up to a factor that no cosine sees, the ridge ``s / (1-s)``.
    """
    d = len(c)
    mu = c.trace() / d
    mean_square = c.square().mean()
    spread = (n + 1) * (mean_square - mu**2 / d)
    s = 1.0 if spread <= 0 else min(1.0, float((mean_square + mu**2) / spread))
    if s >= 1.0:
        raise AtomLensError(f"OAS shrinkage is total at n={n} rows of width {d}: the rows say nothing about the metric")
    return s / (1 - s)


class AtomicInnerProduct:
    """The metric ``S = (C + ridge * tr(C)/d * I)⁻¹`` of activations of width d.

    Args:
        c: second moment of the activations, shape (d, d), float64, before regularisation.
        n: number of rows it comes from.
        ridge: regularisation relative to the mean eigenvalue, or ``"oas"`` for a shrinkage chosen from the data.
        source: what the rows were, kept with the metric because a metric from other text is another metric.

    Raises:
        AtomLensError: one row, non-finite or non-square C, a negative ridge, or a rank-deficient C (unless "oas").
    """

    def __init__(self, c: Float[Tensor, "d d"], n: int, ridge: Ridge = DEFAULT_RIDGE, source: str = "unknown") -> None:
        c = check_rows(c, "the second moment")
        if c.shape[0] != c.shape[1] or not torch.allclose(c, c.T):
            raise AtomLensError(f"the second moment must be square and symmetric, got shape {tuple(c.shape)}")
        if n < 2:
            raise AtomLensError(f"a metric needs at least 2 rows, got {n}")
        d = len(c)
        c = c.double()
        if isinstance(ridge, str):
            if ridge != "oas":
                raise AtomLensError(f"ridge is {ridge!r}, allowed are a number >= 0 and 'oas'")
            rho = oas_ridge(c, n)
        elif isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 <= ridge < math.inf:
            raise AtomLensError(f"ridge is {ridge!r}, allowed are a finite number >= 0 and 'oas'")
        else:
            rho = float(ridge)
            rank = int(torch.linalg.matrix_rank(c, hermitian=True))
            if rank < d:
                raise AtomLensError(
                    f"the activations have rank {rank} of width {d} (n={n} rows): "
                    "give more rows, or ridge='oas' to shrink what they leave open"
                )
        values, vectors = torch.linalg.eigh(c)
        if values[0] < -1e-6 * values[-1].abs():  # what rounding to float32 can do is less
            raise AtomLensError(
                f"the second moment has a negative eigenvalue, {float(values[0]):.3g}, allowed are none"
            )
        self.n, self.ridge, self.source = n, rho, source
        self.eigenvalues: Float[Tensor, " d"] = values.clamp(min=0) + rho * c.trace() / d
        # Contiguous, as they are read back from a file: products then round alike.
        self.eigenvectors: Float[Tensor, "d d"] = vectors.contiguous()

    @classmethod
    def estimate(
        cls, x: Float[Tensor | Rows | np.ndarray, "n d"], ridge: Ridge = DEFAULT_RIDGE, source: str = "unknown"
    ) -> AtomicInnerProduct:
        """Estimate the metric from activations `x`, shape (n, d). Use `SecondMoment` for streams."""
        x = matrix(x, "x")
        moment = SecondMoment(x.shape[-1], x.device).update(x)
        return cls(moment.matrix, moment.n, ridge, source)

    @classmethod
    def from_eigen(
        cls, values: Float[Tensor, " d"], vectors: Float[Tensor, "d d"], n: int, ridge: float, source: str
    ) -> AtomicInnerProduct:
        """Rebuild a metric from the eigen-decomposition of the (already regularised) second moment.

        Raises:
            AtomLensError: shapes do not fit, the values are not finite, positive and ascending, or the vectors are
                not orthonormal.
        """
        d = values.numel()
        if values.shape != (d,) or vectors.shape != (d, d):
            raise AtomLensError(f"eigenvalues {tuple(values.shape)} and eigenvectors {tuple(vectors.shape)} do not fit")
        if not (torch.isfinite(values.reciprocal()).all() and torch.isfinite(vectors).all() and (values > 0).all()):
            raise AtomLensError("the metric is not finite and positive")
        if (values.diff() < 0).any():
            raise AtomLensError("the eigenvalues of the metric do not ascend")
        made = object.__new__(cls)
        made.n, made.ridge, made.source = n, ridge, source
        made.eigenvalues, made.eigenvectors = values.double(), vectors.double()
        return made

    @property
    def width(self) -> int:
        return len(self.eigenvalues)

    @property
    def condition(self) -> float:
        """Condition number of the regularised second moment."""
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    def _power(self, p: float) -> Float[Tensor, "d d"]:
        return (self.eigenvectors * self.eigenvalues**p) @ self.eigenvectors.T

    @cached_property
    def metric(self) -> Float[Tensor, "d d"]:
        """S, shape (d, d), float64."""
        return self._power(-1.0)

    @cached_property
    def sqrt(self) -> Float[Tensor, "d d"]:
        """Symmetric ``S^{1/2}``: the whitening."""
        return self._power(-0.5)

    @cached_property
    def inverse_sqrt(self) -> Float[Tensor, "d d"]:
        """Symmetric ``S^{-1/2}``: undoes the whitening."""
        return self._power(0.5)

    def to(self, device: torch.device | str) -> AtomicInnerProduct:
        """A copy on another device; the dtype is float64 and stays so."""
        return AtomicInnerProduct.from_eigen(
            self.eigenvalues.to(device), self.eigenvectors.to(device), self.n, self.ridge, self.source
        )

    def whiten(self, x: Float[Tensor | np.ndarray, "n d"]) -> Float[Tensor, "n d"]:
        """Rows ``S^{1/2} x``, in which the AIP is the Euclidean inner product. float64."""
        return check_rows(x, "x", self.width).double() @ self.sqrt

    def unwhiten(self, y: Float[Tensor | np.ndarray, "n d"]) -> Float[Tensor, "n d"]:
        """The inverse of `whiten`. float64."""
        return check_rows(y, "y", self.width).double() @ self.inverse_sqrt

    def cosine(
        self, u: Float[Tensor | np.ndarray, "n d"], v: Float[Tensor | np.ndarray, "m d"]
    ) -> Float[Tensor, "n m"]:
        """``<u_i, v_j>_S`` for all pairs, normalised: shape (n, m), float64."""
        return unit_rows(self.whiten(u)) @ unit_rows(self.whiten(v)).T

    def save(self, path: str | Path) -> Path:
        """Write the metric to a safetensors file (exact: float64), replacing it whole or not at all."""
        path = Path(path)
        tensors = {"eigenvalues": self.eigenvalues, "eigenvectors": self.eigenvectors}
        # One key: safetensors keeps no order among several, and equal metrics should be equal files.
        about = {"format": _FORMAT, "n": self.n, "ridge": self.ridge, "source": self.source}
        with replacing(path) as temporary:
            save_file(
                {k: t.cpu().contiguous() for k, t in tensors.items()}, temporary, {"atom_lens": json.dumps(about)}
            )
        return path

    @classmethod
    def load(cls, path: str | Path) -> AtomicInnerProduct:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            AtomLensError: the file holds no metric, or one that is not finite and positive.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no metric at {path}")
        try:
            regular_file(path)
            with safe_open(path, framework="pt") as file:
                about = parse_json((file.metadata() or {})["atom_lens"])
                if about["format"] != _FORMAT:
                    raise AtomLensError(f"its format is {about['format']!r}, known is {_FORMAT!r}")
                if sorted(file.keys()) != ["eigenvalues", "eigenvectors"]:
                    raise AtomLensError(f"it holds {shown(', '.join(sorted(file.keys())))}")
                # Shapes and types are read before any tensor is: they are what a hostile file lies about.
                d = file.get_slice("eigenvalues").get_shape()
                if len(d) != 1 or file.get_slice("eigenvectors").get_shape() != [*d, *d]:
                    raise AtomLensError("eigenvalues and eigenvectors do not fit")
                if {file.get_slice(name).get_dtype() for name in file.keys()} != {"F64"}:  # noqa: SIM118
                    raise AtomLensError("a metric is float64")
                values, vectors = file.get_tensor("eigenvalues"), file.get_tensor("eigenvectors")
            n, ridge, source = about["n"], about["ridge"], about["source"]
            if type(n) is not int or n < 0 or not math.isfinite(ridge) or ridge < 0 or not isinstance(source, str):
                raise AtomLensError(f"n is {shown(n)}, ridge {shown(ridge)} and source {shown(source)}")
            made = cls.from_eigen(values, vectors, n, float(ridge), source)
            if not torch.allclose(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), rtol=0, atol=1e-8):
                raise AtomLensError("the eigenvectors are not orthonormal")
        except OSError:
            raise
        except Exception as error:
            raise AtomLensError(f"{path} is not a metric saved by atom_lens: {shown(str(error))}") from error
        return made

    def __repr__(self) -> str:
        return (
            f"AtomicInnerProduct(width={self.width}, n={self.n}, ridge={self.ridge:.3g}, "
            f"condition={self.condition:.2e}, source={self.source!r})"
        )


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to unit Euclidean norm; a zero row has no direction and is refused."""
    norms = x.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise AtomLensError(f"row {int((norms[:, 0] == 0).nonzero()[0])} is zero and has no direction")
    return x / norms


@dataclass(frozen=True)
class AngleHistogram:
    """Exact histogram of the angles of all pairs, in degrees: `counts[k]` of them lie in [edges[k], edges[k+1])."""

    counts: Int[Tensor, " bins"]
    edges: Float[Tensor, " edges"]
    mean: float

    @property
    def pairs(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Middle of the bin that holds the quantile of `share`, 0 to 1."""
        k = int((self.counts.cumsum(0) >= share * self.pairs).nonzero()[0])
        return float(self.edges[k] + self.edges[k + 1]) / 2

    @property
    def median(self) -> float:
        """Middle of the bin that holds the median."""
        return self.quantile(0.5)


def angle_histogram(
    x: Float[Tensor | np.ndarray, "n d"], metric: AtomicInnerProduct | None = None, bins: int = 3600
) -> AngleHistogram:
    """Angles of all n(n-1)/2 pairs of rows of `x`, shape (n, d); Euclidean, or under `metric`.

    Raises:
        AtomLensError: fewer than two rows, non-finite values, or a zero row.
    """
    x = check_rows(x, "x", None if metric is None else metric.width).detach()
    if len(x) < 2:
        raise AtomLensError(f"angles need at least 2 rows, got {len(x)}")
    u = unit_rows(x.double() if metric is None else metric.whiten(x))

    def angles(rows: slice, columns: slice, cosines: Tensor) -> tuple[Tensor, Tensor]:
        found = pairs_of(rows, columns, cosines).clamp_(-1, 1).acos_().rad2deg_()
        cells = (found * (bins / 180)).long().clamp_(max=bins - 1)
        return torch.bincount(cells, minlength=bins), found.sum()

    counts = torch.zeros(bins, dtype=torch.int64, device=u.device)
    total = torch.zeros((), dtype=torch.float64, device=u.device)
    for part, sum_of_part in over_tiles(u, angles):
        counts += part
        total += sum_of_part
    counts, total = parallel.summed(counts), float(parallel.summed(total))
    return AngleHistogram(counts.cpu(), torch.linspace(0, 180, bins + 1), total / (len(x) * (len(x) - 1) / 2))
