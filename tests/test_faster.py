"""Shortcuts around sae-lens' step: the same trainings; these tests tell when what they lean on has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import shifted
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer

from atom_lens import AtomicInnerProduct, TSAETraining
from atom_lens.dictionaries.tsae.kinds import tsae_learner
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.faster import fuse
from atom_lens.training.fit import fit_together


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
    batches = [x[torch.randint(200, (32,), generator=generator)] @ TSAETraining.whitening(aip).matrix.float()] * 12
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


def test_seeds_whiten_a_batch_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds beside a learner with another metric: trained as each alone, with one whitening less per step."""
    x = shifted(200, 10, generator)
    other = torch.randn(200, 10, generator=generator)
    metrics = {"x": AtomicInnerProduct.estimate(x), "other": AtomicInnerProduct.estimate(other)}
    streams = {"x": x, "other": other}
    training = Training(steps=15, batch_size=32, device="cpu")
    whitened = 0
    scale = ActivationScaler.scale

    def counting(self: ActivationScaler, acts: torch.Tensor) -> torch.Tensor:
        nonlocal whitened
        whitened += 1
        return scale(self, acts)

    def made(names: list[str]) -> dict[str, Any]:
        kinds = {"seed 0": ("x", 0), "seed 1": ("x", 1), "other": ("other", 0)}
        return {
            name: tsae_learner(
                streams[kinds[name][0]],
                metrics[kinds[name][0]],
                Atoms(capacity=30, target_l0=2.0),
                seed=kinds[name][1],
                stream=kinds[name][0],
            )
            for name in names
        }

    monkeypatch.setattr(ActivationScaler, "scale", counting)
    together = made(["seed 0", "seed 1", "other"])
    fit_together(streams, together, training)
    assert whitened == 2 * 15
    for name, learner in together.items():
        alone = made([name])
        fit_together(streams, alone, training)
        for key, value in learner.sae.state_dict().items():
            assert torch.equal(value, alone[name].sae.state_dict()[key]), f"{key} of {name}"
