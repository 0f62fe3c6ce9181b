"""Shortcuts around sae-lens' step: the same trainings; these tests tell when what they lean on has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import shifted
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from support.learners import tsae_learner

from atom_lens import AtomicInnerProduct, TSAETraining
from atom_lens.recipe.sections import Atoms
from atom_lens.training.faster import fuse


def trainer(sae: TSAETraining) -> SAETrainer[Any, Any]:
    settings = SAETrainerConfig(
        total_training_samples=10**6,
        train_batch_size_samples=32,
        lr=1e-3,
        lr_end=1e-4,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, iter(()))


@pytest.mark.parametrize("step", ["dense", "sparse"])
@pytest.mark.parametrize("encoder", ["tied", "free"])
def test_fused_adam_is_adam(step: Any, encoder: Any, generator: torch.Generator) -> None:
    x = shifted(200, 10, generator)
    aip = AtomicInnerProduct.estimate(x)
    batches = [x[torch.randint(200, (32,), generator=generator)]] * 12
    states = []
    for fused in (False, True):
        learner = tsae_learner(x, aip, Atoms(capacity=30, target_l0=2.0, step=step, encoder=encoder))
        assert isinstance(learner.sae, TSAETraining)
        one = trainer(learner.sae.double())
        if fused:
            fuse(one)
        for batch in batches:
            one.step(batch.double())
        states.append(learner.sae.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-6, atol=1e-7, msg=name)
