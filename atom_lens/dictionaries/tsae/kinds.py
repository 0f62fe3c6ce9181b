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
    """A TSAE at its start on activations `x`, under the metric `aip` (`TSAETraining.prepare`).

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
    config = TSAETrainingConfig(
        d_in=aip.width,
        d_sae=atoms.capacity,
        device=pick_device(device),
        target_l0=atoms.target_l0,
        encoder=atoms.encoder,
        start=atoms.start,
        loss_norm=atoms.loss_norm,
        l0_coefficient=atoms.l0_coefficient,
        noise=atoms.noise,
        revival=atoms.revival,
        freeze_decoder=freeze_decoder,
        step=atoms.step,
        encoder_product=atoms.encoder_product,
        jumprelu_bandwidth=atoms.bandwidth,
        metadata=SAEMetadata(**(metadata or {})),
    )
    # sae-lens draws initial weights from the global generator, to be overwritten: leave the user's as it was.
    with torch.random.fork_rng(devices=[]):
        sae = TSAETraining(config)
    whitening = sae.whitening(aip)
    y = (x if isinstance(x, Rows) else Rows(x)).through(whitening.matrix)
    sae.prepare(y, aip, torch.Generator().manual_seed(seed))
    return Learner(sae, stream, whitening)


def finish(learner: Learner, aip: AtomicInnerProduct) -> TSAE:
    """The trained atoms of a `tsae_learner`, on raw activations, with their metric."""
    assert isinstance(learner.sae, TSAETraining)
    with torch.random.fork_rng(devices=[]):
        return learner.sae.finish(aip)


def _start(encoder: str, setup: Setup, level: float, seed: int) -> Learner:
    atoms = setup.atoms.model_copy(update={"encoder": encoder, "target_l0": level})
    return tsae_learner(
        setup.x, setup.aip, atoms, setup.device, seed=seed, metadata=setup.metadata, stream=setup.stream
    )


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
