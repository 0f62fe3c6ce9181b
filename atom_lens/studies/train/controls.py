"""Controls: other starts, other kinds and trained nulls, in the same pass over the activations as the atoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries import Learner, Setup, find_kind, recipes_kind
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.nulls import TrainedNull, shuffle_coordinates
from atom_lens.dictionaries.registry import Trained
from atom_lens.dictionaries.tsae import kinds as tsae
from atom_lens.evidence.identity import identity
from atom_lens.geometry import AtomicInnerProduct, Ridge
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.recipe.split import SplitActivations
from atom_lens.tensors.rows import Rows


@dataclass(frozen=True)
class Fitted:
    """The result of one pass.

    Attributes:
        runs: the atoms, one dictionary per seed.
        sparsity: log10 firing frequencies of each run, shape (F,).
        also: the dictionaries of other kinds, by kind.
        nulls: the trained nulls by name.
        start_pw_mcc: agreement of the runs before training: they start from training activations, and if n is near F
            from mostly the same ones. None for a single run.
    """

    runs: list[Metered]
    sparsity: list[Float[Tensor, " F"]]
    also: dict[str, Metered]
    nulls: dict[str, TrainedNull]
    start_pw_mcc: float | None


@dataclass(frozen=True)
class Plan:
    """What to train at one hook: `training.seeds` dictionaries, other kinds and, unless turned off, nulls.

    Attributes:
        kind: of the atoms and of the nulls.
        also: the other kinds; their learners have their names.
        aip: the metric of the activations.
        learners: by name, at their start.
        streams: the activations that they read, by the names of their streams.
        empty: what each trained null is measured on: training and held-out activations, and their metric.
        start_pw_mcc: as in `Fitted`.
    """

    kind: Trained
    also: list[Trained]
    aip: AtomicInnerProduct
    learners: dict[str, Learner]
    streams: dict[str, Tensor | Rows]
    empty: dict[str, tuple[Tensor | Rows, Tensor | Rows, AtomicInnerProduct]]
    start_pw_mcc: float | None

    def finished(self, sparsity: Mapping[str, Float[Tensor, " F"]]) -> Fitted:
        """The trained dictionaries; `sparsity` is that of `fit_together`."""
        nulls = {
            name: TrainedNull(self.kind.finish(self.learners[name], what[2]), *what)
            for name, what in self.empty.items()
        }
        # Every kind that a recipe can train is ours, and has a metric.
        also = {kind.name: cast("Metered", kind.finish(self.learners[kind.name], self.aip)) for kind in self.also}
        seeds = [name for name in self.learners if name not in {*nulls, *also}]
        runs = [cast("Metered", self.kind.finish(self.learners[name], self.aip)) for name in seeds]
        return Fitted(runs, [sparsity[name] for name in seeds], also, nulls, self.start_pw_mcc)


def plan(
    split: SplitActivations,
    aip: AtomicInnerProduct,
    atoms: Atoms,
    training: Training,
    metadata: Mapping[str, Any] | None = None,
    ridge: Ridge = "oas",
    stream: str = "x",
) -> Plan:
    """Dictionaries and trained nulls of a hook, at their start.

    A frozen decoder is a null for TSAEs only: every report has random directions under another encoder anyway.

    Args:
        split: activations; a pursuit sets its threshold on those for validation, or keeps that of training.
        aip: the metric of the training activations.
        atoms, training: of the recipe.
        metadata: of the atoms.
        ridge: of the metric of the shuffled activations.
        stream: the name of the activations; that of the shuffled ones ends in "shuffled".
    """
    kind, x, seed = recipes_kind(atoms), split.x, training.seed
    setup = Setup(x, aip, atoms, training.device, training.steps, split.validation, metadata or {}, stream)
    learners = {f"seed {i}": kind.start(setup, atoms.target_l0, seed + i) for i in range(training.seeds)}
    start = None
    if training.seeds > 1:
        # In training coordinates the AIP is Euclidean.
        start = identity([learner.sae.W_dec.detach().clone() for learner in learners.values()]).pw_mcc
    also = [find_kind(name, Trained) for name in dict.fromkeys(training.also)]
    learners |= {one.name: one.start(setup, atoms.target_l0, seed) for one in also}
    streams: dict[str, Tensor | Rows] = {stream: x}
    empty: dict[str, Any] = {}
    if training.nulls:
        generator = torch.Generator().manual_seed(seed)
        rows, heldout_rows = shuffle_coordinates(x, generator), shuffle_coordinates(split.heldout, generator)
        shuffled = shuffled_name(stream)
        streams[shuffled] = rows
        alone = AtomicInnerProduct.estimate(rows, ridge, "shuffled coordinates")
        nothing = setup._replace(calibration=None, metadata={})
        if atoms.architecture == "aip_tsae":
            empty["frozen"] = (x, split.heldout, aip)
            # With a frozen decoder everything depends on the encoder, so that is free.
            learners["frozen"] = tsae.start(nothing, atoms.target_l0, seed, "free", freeze_decoder=True)
        empty["shuffled"] = (rows, heldout_rows, alone)
        learners["shuffled"] = kind.start(nothing._replace(x=rows, aip=alone, stream=shuffled), atoms.target_l0, seed)
    return Plan(kind, also, aip, learners, streams, empty, start)


def shuffled_name(stream: str) -> str:
    """The name of a stream with its coordinates shuffled."""
    return "shuffled" if stream == "x" else f"{stream} shuffled"
