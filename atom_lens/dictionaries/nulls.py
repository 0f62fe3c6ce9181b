"""Nulls: dictionaries that have learned nothing, for every number to be compared with (theory.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.dictionaries.pursuit.omp import pursue
from atom_lens.dictionaries.registry import Drawn, Kind, register
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct, check_rows, unit_rows
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows, mean_row, scratch

_SHUFFLED = 1 << 14  # rows among which a value may move


class Pursuit:
    """A dictionary with orthogonal matching pursuit as its encoder: the k best atoms in a norm, found greedily.

    It has what `measure` needs of an sae-lens SAE: `W_dec`, `encode`, `decode`. A null thus gets the same number of
    atoms and the same K as the atoms it is compared with, and a strong encoder. Where nothing is left over (a data
    point that is itself an atom), a code has fewer atoms.

    Args:
        atoms: rows, shape (F, d), of any norm but zero.
        mean: subtracted before and added after, shape (d,).
        norm: of the residuals: the AIP, or None for Euclidean.
        k: most atoms per activation, at least 1.
    """

    def __init__(
        self, atoms: Float[Tensor, "F d"], mean: Float[Tensor, " d"], norm: AtomicInnerProduct | None, k: int
    ) -> None:
        check_rows(atoms, "atoms", len(mean))
        if not 1 <= k <= min(atoms.shape):
            raise AtomLensError(f"k is {k}, allowed is 1 to {min(atoms.shape)}")
        self.norm, self.mean, self.k = norm, mean, k
        units = unit_rows(self._mapped(atoms))
        self.units: Float[Tensor, "F d"] = units.float()
        self.W_dec: Float[Tensor, "F d"] = (units if norm is None else units @ norm.inverse_sqrt).float()

    def _mapped(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return x.double() if self.norm is None else x.double() @ self.norm.sqrt

    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n F"]:
        y = self._mapped(x - self.mean).float()
        return pursue(y, self.units, most=self.k, signed=True, nonnegative=False).dense(len(self.units))

    def decode(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n d"]:
        return feature_acts @ self.W_dec + self.mean

    def residual(self, x: Float[Tensor | Rows, "n d"]) -> Float[Tensor, " n"]:
        """||x - x_hat||² of every row, Euclidean, float64, on the CPU."""
        found = torch.zeros(len(x), dtype=torch.float64, device=self.mean.device)
        for start in parallel.mine(range(0, len(x), 1024)):
            rows = x[start : start + 1024].to(self.mean.device)
            found[start : start + len(rows)] = (rows - self.decode(self.encode(rows))).double().square().sum(dim=1)
        return parallel.summed(found).cpu()


@dataclass(frozen=True)
class TrainedNull:
    """A dictionary trained where there was nothing to learn, and the activations that it is measured on.

    `frozen`: a TSAE whose decoder stayed at random directions, on the real activations. `shuffled`: a TSAE trained and
    measured on activations whose coordinates were shuffled independently, under their own metric.
    """

    atoms: Dictionary
    x: Float[Tensor | Rows, "n d"]
    heldout: Float[Tensor | Rows, "m d"]
    metric: AtomicInnerProduct


def random_atoms(n_atoms: int, metric: AtomicInnerProduct, generator: torch.Generator) -> Float[Tensor, "F d"]:
    """iid directions, uniform under the metric: Gaussian in the whitened space. Shape (n_atoms, d)."""
    gaussian = torch.randn(n_atoms, metric.width, generator=generator, dtype=torch.float64)
    return metric.unwhiten(gaussian.to(metric.eigenvalues.device)).float()


def data_atoms(
    x: Float[Tensor | Rows, "n d"], n_atoms: int, mean: Float[Tensor, " d"], generator: torch.Generator
) -> Float[Tensor, "F d"]:
    """Centred activations drawn without replacement as atoms (all of them, when there are fewer than asked for)."""
    chosen = torch.randperm(len(x), generator=generator)[:n_atoms].to(x.device)
    rows = x[chosen].to(mean.device) - mean
    # A row equal to the mean has no direction.
    return rows[rows.norm(dim=1) > 0]


def shuffle_coordinates(x: Float[Tensor | Rows, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Permute each column independently: every coordinate keeps its values, and nothing else is kept.

    This happens within blocks of randomly drawn rows, so that memory does not grow with n; the result is in a scratch
    file.
    """
    out = scratch(*x.shape)
    for block in torch.randperm(len(x), generator=generator).split(_SHUFFLED):
        rows = x[block.to(x.device)]
        out[block] = rows.gather(0, torch.rand(rows.shape, generator=generator).argsort(dim=0).to(x.device)).cpu()
    return out.to(x.device)


register(
    Drawn(
        name="null_random",
        label="null: random directions",
        marker="x",
        line=":",
        draw=lambda setup, generator: random_atoms(setup.atoms.capacity, setup.aip, generator),
    )
)
register(
    Drawn(
        name="null_data",
        label="null: data points",
        marker="D",
        line="--",
        draw=lambda setup, generator: data_atoms(
            setup.x, setup.atoms.capacity, mean_row(setup.x).to(setup.x.dtype), generator
        ),
    )
)
# Trained with a run's atoms, where there was nothing to learn (`TrainedNull`).
register(Kind(name="null_frozen", label="null: frozen decoder", role="null", marker="s", line="-."))
register(Kind(name="null_shuffled", label="null: shuffled data", role="null", marker="^", line="--"))
