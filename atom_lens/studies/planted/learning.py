"""Which dictionaries find planted atoms, under which encoder: the first test of a new kind, which R² cannot game.

What a kind finds is kept as soon as it is scored, so that a stopped study resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from sklearn.metrics import f1_score
from torch import Tensor

from atom_lens.dictionaries import Dictionary, Setup, Trained, find_kind, kinds
from atom_lens.dictionaries.encoders import Refit, bias_of, under_pursuit
from atom_lens.dictionaries.nulls import Pursuit
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.errors import AtomLensError
from atom_lens.evidence.identity import match
from atom_lens.evidence.measure import measure
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.storage.schema import Section
from atom_lens.studies.cells import kept
from atom_lens.studies.named import KINDS, KindName
from atom_lens.studies.planted.garden import Garden, Planted, draw_codes, plant, varying_codes, window
from atom_lens.studies.planted.result import Learned, Mark, Marks
from atom_lens.training.fit import fit_together

_ASIDE = 8192  # rows on which thresholds of pursuits are set


class Learning(Section):
    """Which SAEs have to find the atoms, and from how many rows. `atoms` has the capacity and the target L0 of all.

    `encoders` says whether their atoms are also scored under encoders other than their own.
    """

    planted: Planted = Planted.model_validate({"noise": 0.1})
    atoms: Atoms
    n: int = Field(20_000, ge=100)
    l1: float = 5.0
    kinds: list[KindName] = Field(
        default_factory=lambda: [one.name for one in kinds(Trained)], min_length=1, validation_alias=KINDS
    )
    encoders: bool = True

    @model_validator(mode="after")
    def _can_train(self) -> Learning:
        for name in self.kinds:
            if not isinstance(kind := find_kind(name), Trained):
                raise AtomLensError(f"learning.kinds has {name!r}, allowed are kinds that are trained")
            if (level := self.level(kind)) < kind.least:
                key = {"l0": "atoms.target_l0", "l1": "l1"}[kind.sparsity]
                raise AtomLensError(f"{key} is {level:g}, allowed is at least {kind.least:g} for {name}")
        return self

    def level(self, kind: Trained) -> float:
        """The sparsity that a kind is asked for."""
        return {"l0": self.atoms.target_l0, "l1": self.l1}[kind.sparsity]


def learn(learning: Learning, training: Training, seed: int, folder: Path) -> Learned:
    """Train every kind on planted activations and score it: MCC under the planted metric, F1 of supports, R².

    Dictionaries train in a metric estimated from the activations; the planted one is only used for scores. As many
    rows as are trained on are held out; numbers are means over seeds.

    Args:
        learning: kinds, and what is planted.
        training: of every kind.
        seed: of what is planted.
        folder: keeps each kind's marks, and those that it holds are not measured again.
    """
    planted, n = learning.planted, learning.n
    garden = plant(planted, seed)
    generator = torch.Generator().manual_seed(seed)
    total = 2 * n + _ASIDE
    if planted.l0 is None:
        codes = draw_codes(total, len(garden.units), planted.k, planted.gap, 1.0, generator)
    else:
        codes = varying_codes(planted, total, seed)
    x = garden.activations(codes, planted.noise, generator).float()
    truth = codes != 0
    aip = AtomicInnerProduct.estimate(x[:n])
    marker = _Marker(garden, aip, x[n : 2 * n], truth[n : 2 * n], x[2 * n :])
    setup = Setup(x[:n], aip, learning.atoms, training.device, training.steps, x[2 * n :])

    def marks(kind: Trained) -> Marks:
        seeds = range(training.seed, training.seed + training.seeds)
        learners = {str(at): kind.start(setup, learning.level(kind), at) for at in seeds}
        fit_together({"x": setup.x}, learners, training)
        runs = [marker.marks(kind.name, kind.finish(one, aip), learning.encoders) for one in learners.values()]
        return Marks(marks=[_mean(several) for several in zip(*runs, strict=True)])

    found = [
        kept(folder / f"{name}.json", Marks, partial(marks, find_kind(name, Trained)), _says) for name in learning.kinds
    ]
    bias = (x[:n].double() - codes[:n] @ garden.atoms).mean(dim=0).float()
    k = int(truth.sum(dim=1).max())
    at = window(garden, planted.model_copy(update={"k": k}))
    return Learned(
        l0=marker.l0,
        coherence=float((garden.units @ garden.units.T).fill_diagonal_(0).abs().max()),
        window=float(at.upper - at.lower),
        truth=list(marker.pursued("truth", garden.atoms.float(), bias)),
        marks=[mark for one in found for mark in one.marks],
    )


def _says(found: Marks) -> str:
    own = found.marks[0]
    return f"MCC {own.mcc:.3f}, F1 {own.f1:.3f}"


def _mean(marks: tuple[Mark, ...]) -> Mark:
    names = {"kind", "encoder"}
    numbers = {
        key: float(np.mean([getattr(one, key) for one in marks])) for key in Mark.model_fields if key not in names
    }
    return Mark(kind=marks[0].kind, encoder=marks[0].encoder, **numbers)


class _Marker:
    """Scores dictionaries on held-out rows whose codes are known."""

    def __init__(
        self,
        garden: Garden,
        aip: AtomicInnerProduct,
        x: Float[Tensor, "n d"],
        truth: Bool[Tensor, "n F"],
        aside: Float[Tensor, "m d"],
    ) -> None:
        self.garden, self.aip, self.x, self.truth, self.aside = garden, aip, x, truth, aside
        self.l0 = float(truth.sum(dim=1).double().mean())

    def marks(self, kind: str, dictionary: Dictionary, encoders: bool) -> list[Mark]:
        found = [self.mark(kind, "own", dictionary)]
        if encoders:
            bias = bias_of(dictionary)
            found += [
                self.mark(kind, "refit", Refit(dictionary, self.aip, bias)),
                *self.pursued(kind, dictionary.W_dec, bias, threshold=not isinstance(dictionary, PursuitSAE)),
            ]
        return found

    def pursued(
        self, kind: str, atoms: Float[Tensor, "F d"], bias: Float[Tensor, " d"], threshold: bool = True
    ) -> Iterator[Mark]:
        """The same atoms under a pursuit with a fixed number of atoms for every row, and under one with a threshold."""
        atoms, bias = atoms.detach().cpu(), bias.cpu()
        atoms = atoms[atoms.norm(dim=1) > 0]
        yield self.mark(kind, "fixed", Pursuit(atoms, bias, self.aip, max(1, round(self.l0))))
        if threshold:
            yield self.mark(kind, "threshold", under_pursuit(atoms, bias, self.aip, self.aside, self.l0))

    @torch.no_grad()
    def mark(self, kind: str, encoder: str, dictionary: Dictionary) -> Mark:
        atoms = dictionary.W_dec.detach().double().cpu()
        alive = atoms.norm(dim=1) > 0
        found = match(self.garden.atoms, atoms[alive], self.garden.metric)
        device = dictionary.W_dec.device
        codes = torch.cat([dictionary.encode(rows.to(device)).cpu() for rows in self.x.split(4096)])
        active = codes[:, alive] != 0
        matched = active[:, found.partner.clamp(min=0)] & (found.partner >= 0)
        figures = measure(dictionary, self.x, self.aip)
        return Mark(
            kind=kind,
            encoder=encoder,
            mcc=float(found.coherence.mean()),
            f1=float(f1_score(self.truth.numpy(), matched.numpy(), average="micro")),
            exact=float((matched == self.truth).all(dim=1).double().mean()),
            l0=float(active.sum(dim=1).double().mean()),
            r2=figures.r2,
            r2_aip=figures.r2_aip,
        )
