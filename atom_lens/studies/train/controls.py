"""Controls: the runs from other starts and the trained nulls, in the same pass over the activations as the atoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries import Learner, Setup, recipes_kind
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.nulls import TrainedNull, shuffle_coordinates
from atom_lens.dictionaries.tsae import kinds as tsae
from atom_lens.evidence.identity import identity
from atom_lens.geometry import AtomicInnerProduct, Ridge
from atom_lens.recipe.sections import Atoms, Training, Wandb
from atom_lens.tensors.rows import Rows
from atom_lens.training.fit import fit_together


@dataclass(frozen=True)
class Fitted:
    """What came out of one pass.

    Attributes:
        runs: the atoms, one per seed.
        sparsity: log10 firing frequencies of each run, shape (F,).
        nulls: the trained nulls by name.
        start_pw_mcc: agreement of the runs before they learned anything: they start from training activations, and
            where n is near F from the same ones. None for a single run.
    """

    runs: list[Metered]
    sparsity: list[Float[Tensor, " F"]]
    nulls: dict[str, TrainedNull]
    start_pw_mcc: float | None

    @property
    def trained(self) -> int:
        return len(self.runs) + len(self.nulls)


def fit_with_controls(
    x: Float[Tensor | Rows, "n d"],
    heldout: Float[Tensor | Rows, "m d"],
    validation: Float[Tensor | Rows, "k d"] | None,
    aip: AtomicInnerProduct,
    atoms: Atoms,
    training: Training,
    metadata: Mapping[str, Any] | None = None,
    wandb: Wandb | None = None,
    run_name: str | None = None,
    ridge: Ridge = "oas",
    checkpoint: Path | None = None,
) -> Fitted:
    """Train `training.seeds` dictionaries and, unless `training.nulls` is off, the trained nulls, in one pass.

    A frozen decoder is a null of TSAEs: random directions under another encoder are among the nulls of every report.

    Args:
        x, heldout: activations of the two splits, shape (n, d) and (m, d); only `x` is learned from.
        validation: activations of neither split, on which a pursuit sets its threshold; None leaves it as trained.
        aip: the metric of `x`.
        atoms, training: of the recipe.
        metadata, wandb, run_name: as in `fit`.
        checkpoint: as in `fit_together`.
        ridge: of the metric of the shuffled activations.
    """
    kind = recipes_kind(atoms)
    setup = Setup(x, aip, atoms, training.device, training.steps, validation, metadata or {})
    learners: dict[str, Learner] = {
        f"seed {i}": kind.start(setup, atoms.target_l0, training.seed + i) for i in range(training.seeds)
    }
    start = None
    if training.seeds > 1:
        # In training coordinates the AIP is Euclidean.
        start = identity([learner.sae.W_dec.detach().clone() for learner in learners.values()]).pw_mcc
    streams: dict[str, Tensor | Rows] = {"x": x}
    empty: dict[str, Any] = {}
    if training.nulls:
        generator = torch.Generator().manual_seed(training.seed)
        rows, heldout_rows = shuffle_coordinates(x, generator), shuffle_coordinates(heldout, generator)
        streams["shuffled"] = rows
        alone = AtomicInnerProduct.estimate(rows, ridge, "shuffled coordinates")
        seed = training.seed
        if atoms.architecture == "aip_tsae":
            empty["frozen"] = (x, heldout, aip)
            # A frozen decoder leaves everything to the encoder, so that one is free.
            alone_with_it = setup._replace(calibration=None, metadata={})
            learners["frozen"] = tsae.start(alone_with_it, atoms.target_l0, seed, "free", freeze_decoder=True)
        empty["shuffled"] = (rows, heldout_rows, alone)
        nothing = setup._replace(x=rows, aip=alone, calibration=None, metadata={}, stream="shuffled")
        learners["shuffled"] = kind.start(nothing, atoms.target_l0, seed)
    sparsity = fit_together(streams, learners, training, wandb, run_name, checkpoint)
    nulls = {name: TrainedNull(kind.finish(learners[name], what[2]), *what) for name, what in empty.items()}
    seeds = [name for name in learners if name not in nulls]
    # What a recipe can train is ours, and has a metric.
    runs = [cast("Metered", kind.finish(learners[name], aip)) for name in seeds]
    return Fitted(runs, [sparsity[name] for name in seeds], nulls, start)
