"""Planted atoms: activations made of known atoms, to test the theorem and to score every trained SAE.

Atoms have unit norm under a known metric, codes are K-sparse with amplitudes in [delta_min, delta_max], and an
anisotropic map hides the metric (theory.md section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from sae_lens.synthetic import (
    ActivationGenerator,
    generate_random_low_rank_correlation_matrix,
    orthogonalize_embeddings,
)
from scipy.linalg import hadamard
from scipy.stats import ortho_group
from torch import Tensor

from atom_lens.dictionaries.tsae.sae import TSAE, TSAEConfig
from atom_lens.errors import AtomLensError
from atom_lens.evidence.certificates import atom_coherence
from atom_lens.evidence.window import ThresholdWindow, threshold_window
from atom_lens.geometry import AtomicInnerProduct, unit_rows
from atom_lens.storage.schema import Section


class Planted(Section):
    """What is planted.

    `atoms`: "two_bases" is an orthonormal basis and its Hadamard transform (F = 2 d, d a power of 2, coherence exactly
    1/sqrt(d)), "orthogonalized" are random directions that sae-lens pushes apart, "random" are left as drawn. `common`
    mixes one direction into all of them, which raises their coherence by about as much.
    """

    width: int = Field(64, ge=4)
    atoms: Literal["two_bases", "orthogonalized", "random"] = "two_bases"
    capacity: int = Field(128, ge=2)
    common: float = Field(0.0, ge=0, lt=1)
    k: int = Field(3, ge=1)
    gap: float = Field(0.8, gt=0, le=1, description="delta_min / delta_max")
    noise: float = Field(0.0, ge=0, description="norm of the noise, in units of delta_max")
    condition: float = Field(1000.0, ge=1, description="condition number of the second moment of the map")
    l0: float | None = Field(None, gt=0, description="mean L0 of codes whose K varies; None gives every code k atoms")
    zipf: float = Field(0.0, ge=0, description="exponent of the frequency of atoms by rank, where K varies")
    correlated: float = Field(0.0, ge=0, lt=1, description="how strongly atoms fire together, where K varies")
    hierarchy: bool = Field(False, description="every second atom fires only with the one before it, where K varies")
    offset: float = Field(0.0, ge=0, description="norm of the mean activation, in units of the root mean square of y")


@dataclass(frozen=True)
class Garden:
    """Planted atoms: `units` in the whitened space, `atoms` in that of activations, both (F, d), and the metric."""

    units: Float[Tensor, "F d"]
    atoms: Float[Tensor, "F d"]
    metric: AtomicInnerProduct
    offset: float = 0.0

    def activations(
        self, codes: Float[Tensor, "n F"], noise: float, generator: torch.Generator
    ) -> Float[Tensor, "n d"]:
        """x = D^T z + noise, the noise isotropic under the metric and of root mean square norm `noise`."""
        y = codes @ self.units
        y = y + noise / y.shape[1] ** 0.5 * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        if self.offset:
            direction = unit_rows(torch.randn(1, y.shape[1], generator=generator, dtype=y.dtype))
            y = y + self.offset * y.square().sum(dim=1).mean().sqrt() * direction
        return self.metric.unwhiten(y)


def check_planted(planted: Planted) -> None:
    """Check that such atoms can be planted.

    Raises:
        AtomLensError: "two_bases" with a width that is not a power of 2 or with more than 2 d atoms, an l0 or a k that
            the number of atoms does not allow.
    """
    d, n_atoms = planted.width, planted.capacity
    if planted.atoms == "two_bases" and (d & (d - 1) or n_atoms > 2 * d):
        raise AtomLensError(
            f"atoms is 'two_bases' with width={d} and capacity={n_atoms}, "
            "allowed are a power of 2 and up to twice as many atoms"
        )
    if planted.l0 is not None and planted.l0 >= n_atoms / 2:
        raise AtomLensError(f"l0 is {planted.l0:g}, allowed is below half of capacity={n_atoms}")
    if planted.l0 is None and (planted.zipf or planted.correlated or planted.hierarchy):
        raise AtomLensError("l0 is null with zipf, correlated or hierarchy, allowed is a mean L0: K varies with them")
    if planted.k >= n_atoms:  # in the hardest codes k atoms are active and another one is not
        raise AtomLensError(f"k is {planted.k}, allowed is below capacity={n_atoms}")


def plant(planted: Planted, seed: int) -> Garden:
    """Atoms and the map, float64.

    Raises:
        AtomLensError: what `check_planted` refuses.
    """
    check_planted(planted)
    d, n_atoms = planted.width, planted.capacity
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.from_numpy(ortho_group.rvs(d, random_state=seed))
    if planted.atoms == "two_bases":
        both = torch.cat([torch.eye(d, dtype=torch.float64), torch.from_numpy(hadamard(d) / d**0.5)])
        units = both[torch.randperm(2 * d, generator=generator)[:n_atoms]] @ rotation
    else:
        units = torch.randn(n_atoms, d, generator=generator)
        if planted.atoms == "orthogonalized":
            units = orthogonalize_embeddings(unit_rows(units)).detach()
        units = unit_rows(units.double())
    if planted.common:
        units = unit_rows((1 - planted.common) ** 0.5 * units + planted.common**0.5 * rotation[0])
    eigenvalues = torch.logspace(0, np.log10(planted.condition), d, dtype=torch.float64)
    turn = torch.from_numpy(ortho_group.rvs(d, random_state=seed + 1))
    metric = AtomicInnerProduct.from_eigen(eigenvalues, turn, 0, 0.0, "planted")
    return Garden(units, metric.unwhiten(units), metric, planted.offset)


def draw_codes(
    n: int, n_atoms: int, k: int, low: float, high: float, generator: torch.Generator
) -> Float[Tensor, "n F"]:
    """Codes with exactly k active atoms, drawn uniformly, of amplitudes uniform in [low, high]."""
    support = torch.rand(n, n_atoms, generator=generator).topk(k, dim=1).indices
    values = low + (high - low) * torch.rand(n, k, generator=generator, dtype=torch.float64)
    return torch.zeros(n, n_atoms, dtype=torch.float64).scatter_(1, support, values)


def varying_codes(planted: Planted, n: int, seed: int) -> Float[Tensor, "n F"]:
    """Codes whose K varies from row to row, by sae-lens' generator; amplitudes uniform in [gap, 1]."""
    assert planted.l0 is not None
    n_atoms = planted.capacity
    generator = torch.Generator().manual_seed(seed)
    # Mandelbrot's offset of 10 ranks keeps the most frequent atoms from being always active.
    often = (torch.arange(n_atoms) + 10.0) ** -planted.zipf
    if planted.hierarchy:  # a child is active half as often as its parent, and never without it
        often[1::2] = often[::2][: n_atoms // 2] / 2
    often = (often / often.sum() * planted.l0).clamp(max=0.5)
    if not planted.hierarchy:
        often = often[torch.randperm(n_atoms, generator=generator)]
    given = often.clone()
    if planted.hierarchy:  # children of silent parents are silenced below; given its parent, a child is a coin flip
        given[1::2] = 0.5
    together = None
    if planted.correlated:
        scale = (planted.correlated / 10) ** 0.5
        together = generate_random_low_rank_correlation_matrix(n_atoms, 10, scale, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # sae-lens' generator has none of its own
        active = ActivationGenerator(n_atoms, given, correlation_matrix=together).sample(n) > 0
    if planted.hierarchy:
        active[:, 1::2] &= active[:, ::2][:, : n_atoms // 2]
    values = planted.gap + (1 - planted.gap) * torch.rand(n, n_atoms, generator=generator, dtype=torch.float64)
    return active * values


def hardest_codes(units: Float[Tensor, "F d"], k: int, low: float, high: float) -> Float[Tensor, "n F"]:
    """For each atom the two codes most likely to be misread.

    In the first the atom is silent and the k atoms most similar to it are active at `high`. In the second it is active
    at `low` and the k - 1 atoms most opposed to it are active at `high`.
    """
    gram = (units @ units.T).fill_diagonal_(-torch.inf)
    silent = torch.zeros_like(gram).scatter_(1, gram.topk(k, dim=1).indices, high)
    gram.fill_diagonal_(torch.inf)
    spoken = torch.zeros_like(gram).scatter_(1, gram.topk(k - 1, dim=1, largest=False).indices, high)
    return torch.cat([silent, spoken.fill_diagonal_(low)])


def theorem_tsae(garden: Garden, dtype: torch.dtype = torch.float64) -> TSAE:
    """The TSAE of the identifiability theorem: W_dec = D, W_enc = D S."""
    n_atoms, d = garden.atoms.shape
    sae = TSAE(TSAEConfig(d_in=d, d_sae=n_atoms, dtype=str(dtype).removeprefix("torch.")))
    weights = {"W_dec": garden.atoms, "W_enc": garden.metric.metric @ garden.atoms.T}
    state = {name: value.to(dtype) for name, value in weights.items()}
    sae.load_state_dict(state, strict=False)
    sae.aip = garden.metric
    return sae


def window(garden: Garden, planted: Planted) -> ThresholdWindow:
    """eps K delta_max < tau < delta_min - eps (K - 1) delta_max at delta_max = 1, with the largest coherence."""
    one = torch.ones(1, dtype=torch.float64)
    eps = atom_coherence(garden.units).max() * one
    k = torch.tensor([planted.k])
    return threshold_window(one, eps, k, k, planted.gap * one, 1.0)


@torch.no_grad()
def wrong_codes(sae: TSAE, tau: float, x: Float[Tensor, "n d"], codes: Float[Tensor, "n F"]) -> int:
    """Number of activations whose code at threshold `tau` has a support other than the planted one."""
    sae.threshold.fill_(tau)
    read = torch.cat([sae.encode(rows.to(sae.W_enc.dtype)) for rows in x.split(4096)])
    return int(((read != 0) != (codes != 0)).any(dim=1).sum())
