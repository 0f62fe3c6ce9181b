"""Fit: activations and a metric in, atoms out, by sae-lens' own trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import wandb as wandb_client
from jaxtyping import Float
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from atom_lens.activations.models import pick_device
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.training.recipe import Atoms, Training, Wandb
from atom_lens.tsae import TSAE, TSAETraining, TSAETrainingConfig


def shuffled_batches(
    x: Float[Tensor, "n d"], batch_size: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "batch d"]]:
    """Endless batches, each row once per epoch in an order of its own; a batch may straddle two epochs."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(len(x), generator=generator)])
        yield x[left[:batch_size]]
        left = left[batch_size:]


def fit(
    x: Float[Tensor, "n d"],
    aip: AtomicInnerProduct,
    atoms: Atoms,
    training: Training,
    metadata: Mapping[str, Any] | None = None,
    wandb: Wandb | None = None,
    run_name: str | None = None,
) -> tuple[TSAE, Float[Tensor, " F"]]:
    """Train a TSAE on activations `x`, shape (n, d), under the metric `aip`.

    Args:
        x: training activations, kept where they are; batches are moved to the device.
        aip: the metric of the training space.
        atoms: capacity, target L0, encoder, loss norm.
        training: steps, batch size, learning rate, seed.
        metadata: of the sae-lens config: model_name, hook_name, ...
        wandb: where the trainer logs to.
        run_name: the name of the run there.

    Returns:
        The atoms on raw activations, and the log10 firing frequency of each, shape (F,).
    """
    device = pick_device(training.device)
    config = TSAETrainingConfig(
        d_in=aip.width,
        d_sae=atoms.capacity,
        device=device,
        target_l0=atoms.target_l0,
        encoder=atoms.encoder,
        loss_norm=atoms.loss_norm,
        tail=atoms.tail,
        revival=atoms.revival,
        jumprelu_bandwidth=atoms.bandwidth,
        metadata=SAEMetadata(**(metadata or {})),
    )
    # sae-lens draws initial weights from the global generator, to be overwritten: leave the user's as it was.
    with torch.random.fork_rng(devices=[]):
        sae = TSAETraining(config)
    generator = torch.Generator().manual_seed(training.seed)
    whitening = sae.whitening(aip)
    sae.prepare((x.double() @ whitening.matrix.to(x.device)).float(), aip, generator)

    logging = LoggingConfig(log_to_wandb=False)
    if wandb is not None and wandb.mode != "disabled":
        try:
            wandb_client.init(project=wandb.project, mode=wandb.mode, name=run_name)
        except wandb_client.Error as error:
            raise ValueError(f"wandb.mode is {wandb.mode!r} and Weights & Biases did not start: {error}") from error
        logging = LoggingConfig(wandb_project=wandb.project, run_name=run_name)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=training.steps * training.batch_size,
            train_batch_size_samples=training.batch_size,
            lr=training.lr,
            lr_end=training.lr / 10,  # of schedules we do not use, but it may not be None
            lr_warm_up_steps=round(training.warm_up * training.steps),
            lr_decay_steps=round(training.decay * training.steps),
            device=device,
            dead_feature_window=training.dead_after,
            # One window over the whole run would count the untrained start; the last tenth is what is reported.
            feature_sampling_window=max(1, training.steps // 10 * 9) if training.steps >= 10 else training.steps,
            logger=logging,
        ),
        sae,
        shuffled_batches(x, training.batch_size, generator),
    )
    trainer.activation_scaler.whitening = whitening
    try:
        trainer.fit()
    finally:
        if logging.log_to_wandb:
            wandb_client.finish()
    with torch.random.fork_rng(devices=[]):
        return sae.finish(aip), trainer.log_feature_sparsity
