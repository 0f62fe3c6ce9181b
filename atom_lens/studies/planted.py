"""Planted atoms: activations made of known atoms, on which the theorem and every trained SAE can be marked.

Atoms are unit under a known metric, codes are K-sparse with amplitudes in [delta_min, delta_max], and an anisotropic
map hides the metric (theory.md section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from sae_lens.synthetic import orthogonalize_embeddings
from scipy.linalg import hadamard
from scipy.stats import ortho_group
from sklearn.metrics import f1_score
from torch import Tensor

from atom_lens.dictionaries import Dictionary, Setup, Trained, find_kind, kinds
from atom_lens.dictionaries.tsae.sae import TSAE, TSAEConfig
from atom_lens.evidence.certificates import atom_coherence
from atom_lens.evidence.identity import match
from atom_lens.evidence.window import ThresholdWindow, threshold_window
from atom_lens.geometry import AtomicInnerProduct, unit_rows
from atom_lens.recipe.reading import load_section
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.storage.schema import Section, Seed
from atom_lens.studies.report_text import aligned
from atom_lens.studies.units import Unit
from atom_lens.training.fit import fit_together


class Planted(Section):
    """What is planted.

    `atoms`: "two_bases" is an orthonormal basis and its Hadamard transform (F = 2 d, d a power of 2, coherence exactly
    1/sqrt(d)), "orthogonalized" are directions that sae-lens pushed apart, "random" are as they fell. `common` mixes
    one direction into all of them, which raises their coherence by about as much.
    """

    width: int = Field(64, ge=4)
    atoms: Literal["two_bases", "orthogonalized", "random"] = "two_bases"
    capacity: int = Field(128, ge=2)
    common: float = Field(0.0, ge=0, lt=1)
    k: int = Field(3, ge=1)
    gap: float = Field(0.8, gt=0, le=1, description="delta_min / delta_max")
    noise: float = Field(0.0, ge=0, description="norm of the noise, in units of delta_max")
    condition: float = Field(1000.0, ge=1, description="condition number of the second moment of the map")


class Theorem(Section):
    """How often the theorem is put to the test, and on what."""

    planted: Planted = Planted.model_validate({"width": 256, "capacity": 512})
    dictionaries: int = Field(20, ge=1)
    codes: int = Field(10_000, ge=1)
    noise: list[float] = Field([0.0, 1.0, 2.0, 4.0, 8.0])
    gap: list[float] = Field([1.0, 0.6, 0.3, 0.2, 0.1])


class Learning(Section):
    """Which SAEs have to find the atoms, from how much. `atoms` has the capacity and the target L0 of all units."""

    planted: Planted = Planted.model_validate({"noise": 0.1})
    atoms: Atoms
    n: int = Field(20_000, ge=100)
    l1: float = 5.0
    units: list[Unit] = Field(default_factory=lambda: [one.name for one in kinds(Trained)], min_length=1)

    @field_validator("units")
    @classmethod
    def _are_trained(cls, units: list[str]) -> list[str]:
        for unit in units:
            if not isinstance(find_kind(unit), Trained):
                raise ValueError(f"learning.units has {unit!r}, allowed are units that are trained")
        return units


class PlantedRecipe(Section):
    """The study."""

    name: str
    theorem: Theorem = Theorem.model_validate({})
    learning: Learning | None = None
    training: Training | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class Garden:
    """Planted atoms: `units` in the whitened space, `atoms` as activations see them, both (F, d), and the metric."""

    units: Float[Tensor, "F d"]
    atoms: Float[Tensor, "F d"]
    metric: AtomicInnerProduct

    def activations(
        self, codes: Float[Tensor, "n F"], noise: float, generator: torch.Generator
    ) -> Float[Tensor, "n d"]:
        """x = D^T z + noise, the noise isotropic under the metric and of root mean square norm `noise`."""
        y = codes @ self.units
        y = y + noise / y.shape[1] ** 0.5 * torch.randn(y.shape, generator=generator, dtype=y.dtype)
        return self.metric.unwhiten(y)


def load_planted(path: str | Path, overrides: Sequence[str] = ()) -> PlantedRecipe:
    """Read the study's recipe; errors are one sentence, as for any recipe."""
    return load_section(PlantedRecipe, path, overrides)


def check_planted(planted: Planted) -> None:
    """Whether such atoms can be planted.

    Raises:
        ValueError: "two_bases" with a width that is no power of 2 or more than 2 d atoms, or k that is not below the
            number of atoms.
    """
    d, n_atoms = planted.width, planted.capacity
    if planted.atoms == "two_bases" and (d & (d - 1) or n_atoms > 2 * d):
        raise ValueError(
            f"atoms is 'two_bases' with width={d} and capacity={n_atoms}, "
            "allowed are a power of 2 and up to twice as many atoms"
        )
    if planted.k >= n_atoms:  # the hardest codes hold an atom silent beside k others
        raise ValueError(f"k is {planted.k}, allowed is below capacity={n_atoms}")


def plant(planted: Planted, seed: int) -> Garden:
    """Atoms and the map, float64.

    Raises:
        ValueError: what `check_planted` refuses.
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
    return Garden(units, metric.unwhiten(units), metric)


def draw_codes(
    n: int, n_atoms: int, k: int, low: float, high: float, generator: torch.Generator
) -> Float[Tensor, "n F"]:
    """Codes with exactly k active atoms, drawn uniformly, of amplitudes uniform in [low, high]."""
    support = torch.rand(n, n_atoms, generator=generator).topk(k, dim=1).indices
    values = low + (high - low) * torch.rand(n, k, generator=generator, dtype=torch.float64)
    return torch.zeros(n, n_atoms, dtype=torch.float64).scatter_(1, support, values)


def hardest_codes(units: Float[Tensor, "F d"], k: int, low: float, high: float) -> Float[Tensor, "n F"]:
    """For each atom the two codes most likely to be misread.

    In the first the atom is silent and hears the k atoms that look most like it, at `high`. In the second it speaks at
    `low` while the k - 1 atoms that look most unlike it speak at `high`.
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
    """Activations whose code at threshold `tau` has another support than the planted one."""
    sae.threshold.fill_(tau)
    read = torch.cat([sae.encode(rows.to(sae.W_enc.dtype)) for rows in x.split(4096)])
    return int(((read != 0) != (codes != 0)).any(dim=1).sum())


def check_theorem(theorem: Theorem, seed: int) -> dict[str, Any]:
    """Wrong codes inside the window and beyond each of its ends, over several dictionaries.

    Half of the codes at most are the hardest ones; so just outside it is certain that some are misread.
    """
    planted = theorem.planted
    found: dict[str, Any] = {"dictionaries": theorem.dictionaries, "codes": theorem.codes}
    counts = {"inside, float64": 0, "inside, float32": 0, "1% below": 0, "1% above": 0, "gap closed": 0}
    for number in range(theorem.dictionaries):
        garden = plant(planted, seed + 10 * number)
        generator = torch.Generator().manual_seed(seed + number)
        at = window(garden, planted)
        low, high = float(at.lower), float(at.upper)
        if low >= high:
            least = low + planted.gap - high
            raise ValueError(f"the window is empty: gap is {planted.gap}, allowed is above eps (2K - 1) = {least:.3f}")
        hardest = hardest_codes(garden.units, planted.k, planted.gap, 1.0)[: theorem.codes // 2]
        n = theorem.codes - len(hardest)
        codes = torch.cat([hardest, draw_codes(n, len(garden.units), planted.k, planted.gap, 1.0, generator)])
        x = garden.activations(codes, 0.0, generator)
        middle = (low + high) / 2
        exact, single = theorem_tsae(garden), theorem_tsae(garden, torch.float32)
        counts["inside, float64"] += wrong_codes(exact, middle, x, codes)
        counts["inside, float32"] += wrong_codes(single, middle, x, codes)
        counts["1% below"] += wrong_codes(exact, 0.99 * low, x, codes)
        counts["1% above"] += wrong_codes(exact, 1.01 * high, x, codes)
        # Smallest amplitudes just under the condition: no threshold is right for all codes.
        closed = 0.99 * (low + planted.gap - high)
        codes = hardest_codes(garden.units, planted.k, closed, 1.0)
        x = garden.activations(codes, 0.0, generator)
        taus = torch.linspace(0.5 * closed, 1.5 * low, 41).tolist()
        counts["gap closed"] += min(wrong_codes(exact, tau, x, codes) for tau in taus)
        found["window"] = [low, high]
    return {**found, "wrong": counts}


def decay(theorem: Theorem, seed: int) -> dict[str, list[dict[str, float]]]:
    """Share of codes read exactly as noise grows and as the gap between amplitudes closes, tau in mid-window."""
    found: dict[str, list[dict[str, float]]] = {"noise": [], "gap": []}
    for key, levels in (("noise", theorem.noise), ("gap", theorem.gap)):
        for level in levels:
            planted = theorem.planted.model_copy(update={key: level})
            garden = plant(planted, seed)
            generator = torch.Generator().manual_seed(seed)
            codes = draw_codes(theorem.codes, len(garden.units), planted.k, planted.gap, 1.0, generator)
            x = garden.activations(codes, planted.noise, generator)
            at = window(garden, planted)
            tau = float(at.lower + at.upper) / 2
            wrong = wrong_codes(theorem_tsae(garden), tau, x, codes)
            open_by = float(at.upper - at.lower)
            found[key].append({"level": level, "window": open_by, "tau": tau, "exact": 1 - wrong / len(codes)})
    return found


def learn(learning: Learning, training: Training, seed: int) -> list[dict[str, Any]]:
    """Train every unit on the planted activations and mark it: MCC under the planted metric, F1 of supports.

    The metric that TSAEs train in is estimated from the activations, the planted one only marks. Half of the data is
    held out; figures are means over seeds.
    """
    planted = learning.planted
    garden = plant(planted, seed)
    generator = torch.Generator().manual_seed(seed)
    codes = draw_codes(2 * learning.n, len(garden.units), planted.k, planted.gap, 1.0, generator)
    x = garden.activations(codes, planted.noise, generator).float()
    x, heldout, truth = x[: learning.n], x[learning.n :], codes[learning.n :] != 0
    setup = Setup(x, AtomicInnerProduct.estimate(x), learning.atoms, training.device)
    levels = {"l0": learning.atoms.target_l0, "l1": learning.l1}
    result = []
    for unit in learning.units:
        kind = find_kind(unit, Trained)
        level = levels[kind.sparsity]
        learners = {str(i): kind.start(setup, level, training.seed + i) for i in range(training.seeds)}
        fit_together({"x": x}, learners, training)
        marks = [_mark(kind.finish(one, setup.aip), garden, heldout, truth) for one in learners.values()]
        result.append({"unit": unit, **{key: float(np.mean([m[key] for m in marks])) for key in marks[0]}})
    return result


@torch.no_grad()
def _mark(dictionary: Dictionary, garden: Garden, x: Float[Tensor, "n d"], truth: Tensor) -> dict[str, float]:
    atoms = dictionary.W_dec.detach().double().cpu()
    alive = atoms.norm(dim=1) > 0
    found = match(garden.atoms, atoms[alive], garden.metric)
    codes = torch.cat([dictionary.encode(rows.to(dictionary.W_dec.device)).cpu() for rows in x.split(4096)])
    active = codes[:, alive] != 0
    matched = active[:, found.partner.clamp(min=0)] & (found.partner >= 0)
    return {
        "mcc": float(found.coherence.mean()),
        "f1": float(f1_score(truth.numpy(), matched.numpy(), average="micro")),
        "exact": float((matched == truth).all(dim=1).double().mean()),
        "l0": float(active.sum(dim=1).double().mean()),
    }


def planted(recipe: PlantedRecipe) -> dict[str, Any]:
    """The whole study: the theorem, its decay, and what trained SAEs find.

    Raises:
        ValueError: before any work, what cannot be planted, drawn or trained.
    """
    if recipe.learning is not None and recipe.training is None:
        raise ValueError("key training is missing, learning needs it")
    if any(level < 0 for level in recipe.theorem.noise):
        raise ValueError(f"theorem.noise has {min(recipe.theorem.noise):g}, allowed is 0 or more")
    for level in recipe.theorem.gap:
        if not 0 < level <= 1:
            raise ValueError(f"theorem.gap has {level:g}, allowed is above 0 and up to 1")
    for part in (recipe.theorem, recipe.learning):
        if part is not None:
            check_planted(part.planted)
    found: dict[str, Any] = {
        "theorem": check_theorem(recipe.theorem, recipe.seed),
        "decay": decay(recipe.theorem, recipe.seed),
    }
    if recipe.learning is not None and recipe.training is not None:
        found["learning"] = learn(recipe.learning, recipe.training, recipe.seed)
    return found


def planted_table(found: dict[str, Any]) -> str:
    """The study as a person reads it."""
    theorem = found["theorem"]
    low, high = theorem["window"]
    total = theorem["dictionaries"] * theorem["codes"]
    head = f"theorem: {theorem['dictionaries']} dictionaries, {total} codes each way, window {low:.4f} to {high:.4f}"
    blocks = [
        head + "\n\n" + aligned([["threshold", "wrong codes"], *([k, str(v)] for k, v in theorem["wrong"].items())])
    ]
    for key, rows in found["decay"].items():
        cells = [[key, "window is open by", "codes read exactly"]]
        cells += [[f"{r['level']:g}", f"{r['window']:.3f}", f"{r['exact']:.4f}"] for r in rows]
        blocks.append(aligned(cells))
    if "learning" in found:
        cells = [["trained", "MCC (AIP)", "support F1", "codes exact", "L0"]]
        cells += [
            [r["unit"], f"{r['mcc']:.3f}", f"{r['f1']:.3f}", f"{r['exact']:.3f}", f"{r['l0']:.2f}"]
            for r in found["learning"]
        ]
        blocks.append(aligned(cells))
    return "\n\n".join(blocks)
