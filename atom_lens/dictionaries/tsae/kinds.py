"""TSAEs, tied and free: threshold SAEs in the atomic inner product (theory.md section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.registry import Learner, Setup, Trained, register
from atom_lens.dictionaries.tsae.sae import TSAE
from atom_lens.dictionaries.tsae.training import TSAETraining, TSAETrainingConfig
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.sections import Atoms
from atom_lens.tensors.rows import Rows

COLOR = "#d6506a"


def tsae_learner(
    x: Float[Tensor | Rows, "n d"],
    aip: AtomicInnerProduct,
    atoms: Atoms,
    device: str = "cpu",
    *,
    seed: int = 0,
    freeze_decoder: bool = False,
    metadata: Mapping[str, Any] | None = None,
    stream: str = "x",
) -> Learner:
    """A TSAE at its start on activations `x`, under the metric `aip` (`TSAETraining.begin`).

    Args:
        x: training activations, shape (n, d).
        aip: the metric of the training space.
        atoms: capacity, target L0, encoder, loss norm.
        device: where it trains.
        seed: of the activations that it starts from.
        freeze_decoder: random directions that stay as they are: a null.
        metadata: of the sae-lens config: model_name, hook_name, ...
        stream: where its activations will come from.
    """
    config = TSAETrainingConfig.of(
        atoms,
        aip.width,
        device=pick_device(device),
        freeze_decoder=freeze_decoder,
        ridge=aip.ridge,
        seed=seed,
        metadata=SAEMetadata(**(metadata or {})),
    )
    # sae-lens draws initial weights from the global generator, to be overwritten: leave the user's as it was.
    with torch.random.fork_rng(devices=[]):
        sae = TSAETraining(config)
    sae.begin(x, aip, torch.Generator().manual_seed(seed))
    return Learner(sae, stream, sae.scaler.whitening)


def finish(learner: Learner, aip: AtomicInnerProduct) -> TSAE:
    """The trained atoms of a `tsae_learner`, on raw activations, with their metric."""
    assert isinstance(learner.sae, TSAETraining)
    atoms = learner.sae.finish()
    atoms.aip = aip
    return atoms


def _start(encoder: str, setup: Setup, level: float, seed: int) -> Learner:
    atoms = setup.atoms.model_copy(update={"encoder": encoder, "target_l0": level})
    return tsae_learner(setup.x, setup.aip, atoms, setup.device, seed=seed)


for _encoder, _marker in (("tied", "X"), ("free", "*")):
    register(
        Trained(
            name=f"tsae_{_encoder}",
            label=f"TSAE, {_encoder} (ours)",
            role="ours",
            color=COLOR,
            marker=_marker,
            start=partial(_start, _encoder),
            finish=finish,
        )
    )
