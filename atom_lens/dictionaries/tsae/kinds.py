"""TSAEs, tied and free: threshold SAEs in the atomic inner product (theory.md section 3)."""

from __future__ import annotations

from functools import partial

from sae_lens.saes.sae import SAEMetadata

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.registry import Learner, Setup, Trained, finish, register
from atom_lens.dictionaries.tsae.training import TSAETraining, TSAETrainingConfig

COLOR = "#8e5bb0"


def start(setup: Setup, level: float, seed: int, encoder: str, freeze_decoder: bool = False) -> Learner:
    """A TSAE at its start.

    Args:
        setup: activations, their metric, and the recipe's section.
        level: the target L0.
        seed: of the activations that it starts from, and of the noise.
        encoder: tied or free.
        freeze_decoder: keep the decoder at random directions: a null.
    """
    config = TSAETrainingConfig.of(
        setup.atoms.model_copy(update={"encoder": encoder, "target_l0": level}),
        setup.aip.width,
        device=pick_device(setup.device),
        freeze_decoder=freeze_decoder,
        ridge=setup.aip.ridge,
        seed=seed,
        metadata=SAEMetadata(**setup.metadata),
    )
    return Learner.begun(lambda: TSAETraining(config), setup, seed)


for _encoder, _marker in (("tied", "X"), ("free", "*")):
    register(
        Trained(
            name=f"tsae_{_encoder}",
            label=f"TSAE, {_encoder} (ours)",
            role="ours",
            color=COLOR,
            marker=_marker,
            start=partial(start, encoder=_encoder),
            finish=finish,
        )
    )
