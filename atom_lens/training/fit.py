"""Fit: activations in, dictionaries out. sae-lens' own trainer trains any number of them in one pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import wandb as wandb_client
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries import Learner, Setup, recipes_kind
from atom_lens.dictionaries.metered import Metered
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.sections import Atoms, Training, Wandb
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows
from atom_lens.training.checkpoint import Batches, BatchSource, Checkpoints
from atom_lens.training.faster import fuse


def fit_together(
    streams: Mapping[str, Float[Tensor | Rows, "n _"]] | BatchSource,
    learners: Mapping[str, Learner],
    training: Training,
    logging: LoggingConfig | None = None,
    checkpoint: Path | None = None,
    evaluator: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Float[Tensor, " F"]]:
    """Train all `learners` in one pass over the activations; whitening and scaling are folded in at the end.

    Several processes (`parallel`) divide them, and each has all of them afterwards.

    Args:
        streams: activations by name, the same number of rows each, kept where they are; batches move to the device.
            Or a source of batches.
        learners: by name; their SAEs are trained in place.
        training: steps, batch size, learning rate; its seed orders the rows.
        logging: how the trainer logs (`wandb_run`); None turns it off.
        checkpoint: file for the state of the training, written every `training.checkpoint_minutes`; a training that
            finds one resumes from it, to the same bits. Whoever keeps the result removes it.
        evaluator: measures the SAEs while they train, to be logged.

    Returns:
        The log10 firing frequency of every atom over the last tenth of training, shape (F,) each.
    """
    found = {name: torch.zeros(learner.sae.cfg.d_sae) for name, learner in learners.items()}
    own = dict(parallel.mine(learners.items()))
    if not own and not isinstance(streams, Mapping):
        # Processes read a stream together: one with nothing to train keeps in step by training a copy.
        own = dict([next(iter(learners.items()))])
    if own:
        trainer = _trained(streams, own, training, logging, checkpoint, evaluator)
        found |= {name: one.log_feature_sparsity.cpu().float() for name, one in trainer.trainers.items()}
    if parallel.size() > 1:
        for number, (name, learner) in enumerate(learners.items()):
            _share(learner.sae, found[name], source=number % parallel.size())
    return found


def _trained(
    streams: Mapping[str, Float[Tensor | Rows, "n _"]] | BatchSource,
    learners: Mapping[str, Learner],
    training: Training,
    logging: LoggingConfig | None,
    checkpoint: Path | None,
    evaluator: Callable[..., dict[str, Any]] | None,
) -> MultiSAETrainer:
    """The trainer of all `learners` after its last step."""
    device = pick_device(training.device)
    for learner in learners.values():
        learner.sae.to(device)
    batches = Batches(streams, training.batch_size, training.seed) if isinstance(streams, Mapping) else streams
    trainer = MultiSAETrainer(
        SAETrainerConfig(
            total_training_samples=training.steps * training.batch_size,
            train_batch_size_samples=training.batch_size,
            lr=training.lr,
            lr_end=training.lr / 10,  # only for schedules that are not used here, but it must not be None
            lr_warm_up_steps=round(training.warm_up * training.steps),
            lr_decay_steps=round(training.decay * training.steps),
            device=device,
            dead_feature_window=training.dead_after,
            # One window over the whole run would count the untrained start; the last tenth is what is reported.
            feature_sampling_window=max(1, training.steps // 10 * 9) if training.steps >= 10 else training.steps,
            n_batches_for_norm_estimate=max(1, len(batches) // training.batch_size),
            logger=logging or LoggingConfig(log_to_wandb=False),
        ),
        {name: learner.sae for name, learner in learners.items()},
        {name: learner.stream for name, learner in learners.items()},
        batches,
        evaluator,
    )
    for one in trainer.trainers.values():
        fuse(one)
    if checkpoint is not None:
        about = {
            "training": training.model_dump(),
            "learners": {name: learner.sae.cfg.to_dict() for name, learner in learners.items()},
        }
        batches.checkpoints = Checkpoints(checkpoint, trainer, batches, training.checkpoint_minutes, about)
        batches.checkpoints.restore()
    trainer.fit()
    return trainer


def _share(sae: TrainingSAE[Any], sparsity: Float[Tensor, " F"], source: int) -> None:
    """Give every process what process `source` trained."""
    for value in (*sae.state_dict().values(), sparsity):
        whole = value.detach().contiguous()
        value.detach().copy_(parallel.sent(whole, source))
    # The end of a training folds the whitening in and changes this, as it does for scaling.
    sae.cfg.normalize_activations = parallel.agreed(lambda: sae.cfg.normalize_activations, source)


def encoder_seconds(width: int, atoms: Atoms, training: Training) -> float:
    """Seconds that this machine takes for the encoder's product of one batch: a lower bound for a training step.

    The median of a few, in the precision that the product has in training.
    """
    device = pick_device(training.device)
    dtype = getattr(torch, atoms.encoder_product if atoms.step == "sparse" else "float32")
    x = torch.ones(training.batch_size, width, dtype=dtype, device=device)
    weights = torch.ones(atoms.capacity, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        (x @ weights.T)[0, 0].item()  # this waits for a GPU
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


@contextmanager
def wandb_run(wandb: Wandb | None, run_name: str | None) -> Iterator[LoggingConfig]:
    """A run on Weights & Biases if the recipe asks for one, and how a trainer logs to it.

    Raises:
        AtomLensError: the run did not start.
    """
    if wandb is None or wandb.mode == "disabled":
        yield LoggingConfig(log_to_wandb=False)
        return
    try:
        wandb_client.init(project=wandb.project, mode=wandb.mode, name=run_name)
    except wandb_client.Error as error:
        raise AtomLensError(f"wandb.mode is {wandb.mode!r} and Weights & Biases did not start: {error}") from error
    try:
        yield LoggingConfig(wandb_project=wandb.project, run_name=run_name)
    finally:
        wandb_client.finish()


def fit_one(
    x: Float[Tensor | Rows, "n d"],
    aip: AtomicInnerProduct,
    atoms: Atoms,
    training: Training,
    metadata: Mapping[str, Any] | None = None,
    calibration: Float[Tensor | Rows, "m d"] | None = None,
) -> tuple[Metered, Float[Tensor, " F"]]:
    """Train one dictionary, the one that `atoms` describes, on activations `x`, shape (n, d), under the metric `aip`.

    Args:
        calibration: activations not trained on, shape (m, d), on which a pursuit sets its threshold; None keeps the
            threshold of training.

    Returns:
        The atoms on raw activations, and the log10 firing frequency of each, shape (F,).
    """
    kind = recipes_kind(atoms)
    setup = Setup(x, aip, atoms, training.device, training.steps, calibration, metadata or {})
    learner = kind.start(setup, atoms.target_l0, training.seed)
    sparsity = fit_together({"x": x}, {"atoms": learner}, training)
    return cast("Metered", kind.finish(learner, aip)), sparsity["atoms"]
