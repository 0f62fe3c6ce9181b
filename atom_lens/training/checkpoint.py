"""Checkpoints: everything that a training depends on, in one safetensors file, so that it resumes bit for bit.

sae-lens' own trainer state is a pickle, and has neither the order of the data nor our generators.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationWhitening
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atom_lens.dictionaries.learning import Learning
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import regular_file, replacing
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows

logger = logging.getLogger(__name__)
_FORMAT = "atom_lens.checkpoint.1"


@runtime_checkable
class BatchSource(Protocol):
    """Endless batches, by the names of their streams, that can be resumed."""

    checkpoints: Checkpoints | None
    together: bool

    @property
    def about(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Batches:
    """Endless batches, the same rows of every stream, each row once per epoch; a batch may straddle two epochs.

    Attributes:
        left: rows of this epoch that are not used yet.
        generator: shuffles the next epoch.
        checkpoints: written between two steps, if any.
        together: False: each of several processes reads them by itself.
    """

    together = False

    def __init__(self, streams: Mapping[str, Float[Tensor | Rows, "n _"]], batch_size: int, seed: int) -> None:
        self.streams, self.batch_size = streams, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.long)
        self.checkpoints: Checkpoints | None = None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[Tensor, Future[dict[str, Tensor]]] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What distinguishes these activations from others."""
        return {"streams": {name: fingerprint(x) for name, x in self.streams.items()}}

    def __len__(self) -> int:
        return len(next(iter(self.streams.values())))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        # The trainer asks for a batch between two steps: the only moment when its state is consistent.
        if self.checkpoints is not None:
            self.checkpoints.keep_if_due()
        while len(self.left) < self.batch_size:
            self.left = torch.cat([self.left, torch.randperm(len(self), generator=self.generator)])
        rows, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        known = self._ahead is not None and torch.equal(self._ahead[0], rows)
        batch = self._ahead[1].result() if self._ahead is not None and known else self._read(rows)
        # Read the next batch, perhaps from a disk, while the trainer works on this one.
        following = self.left[: self.batch_size]
        full = len(following) == self.batch_size
        self._ahead = (following, self._reader.submit(self._read, following)) if full else None
        return batch

    def _read(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: x[rows.to(x.device)] for name, x in self.streams.items()}

    def state(self) -> dict[str, Any]:
        """Everything that future batches depend on."""
        return {"left": self.left, "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`."""
        self.left = state["left"]
        self.generator.set_state(state["generator"])


class Checkpoints:
    """Checkpoints of one training in one file, which is replaced atomically.

    Args:
        path: of the file.
        trainer: of all learners.
        batches: what it reads.
        minutes: between two checkpoints; 0 writes one before every step.
        about: describes the training; only the same training resumes.
    """

    def __init__(
        self, path: Path, trainer: MultiSAETrainer, batches: BatchSource, minutes: float, about: Mapping[str, Any]
    ) -> None:
        self.path, self.trainer, self.batches, self.seconds = path, trainer, batches, 60 * minutes
        self.about = json.loads(json.dumps({**about, **batches.about}))
        self.here = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": trainer.cfg.device}
        self.last = time.monotonic()

    def keep_if_due(self) -> None:
        """Write a checkpoint if the last one is old enough; the trainer must be between two steps."""
        steps = self.trainer.n_training_steps
        # Where sae-lens has just reset its firing counts, resuming would divide by zero.
        if steps == 0 or steps % self.trainer.cfg.feature_sampling_window == 0:
            return
        due = time.monotonic() - self.last >= self.seconds
        if parallel.agreed(lambda: due) if self.batches.together else due:
            self.keep()
            self.last = time.monotonic()

    def keep(self) -> None:
        """Write the file; processes that read together replace theirs at the same time, when all have written."""
        tensors: dict[str, Tensor] = {}
        learners = {name: _state(trainer) for name, trainer in self.trainer.trainers.items()}
        state = {**self.batches.state(), "learners": learners}
        text = json.dumps({"format": _FORMAT, "about": self.about, "here": self.here, "state": _packed(state, tensors)})
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, {"atom_lens": text, "sha256": _digest(text, tensors)})
            if self.batches.together:
                parallel.together()

    def restore(self) -> bool:
        """Resume trainer and data from the file, if there is one; processes that read together all need one.

        Returns:
            Whether it resumed.

        Raises:
            AtomLensError: the file is damaged, or of another training.
        """
        there, together = self.path.exists(), self.batches.together
        if not (parallel.all_agree(there) if together else there):
            return False
        regular_file(self.path)
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = metadata["atom_lens"]
            if _digest(text, tensors) != metadata["sha256"]:
                raise AtomLensError("its SHA-256 is not the one that was written")
            found = json.loads(text)
            if found["format"] != _FORMAT:
                raise AtomLensError(f"its format is {found['format']!r}, known is {_FORMAT!r}")
        except Exception as error:
            raise AtomLensError(
                f"checkpoint {str(self.path)!r} is damaged, remove it to start over: {error}"
            ) from error
        for key, value in self.about.items():
            if found["about"].get(key) != value:
                raise AtomLensError(
                    f"checkpoint {str(self.path)!r} is of another training, its {key} differ: remove it"
                )
        if found["here"] != self.here:
            logger.warning("the checkpoint is of %s, this is %s: the last bits may differ", found["here"], self.here)
        state = _unpacked(found["state"], tensors)
        step = next(iter(state["learners"].values()))["n_training_steps"]
        if together and parallel.agreed(lambda: step) != step:
            raise AtomLensError(
                f"checkpoint {str(self.path)!r} is of step {step}, process 0 has another: remove both to start over"
            )
        self.batches.restore(state)
        for name, trainer in self.trainer.trainers.items():
            _restore(trainer, state["learners"][name])
        one = next(iter(self.trainer.trainers.values()))
        self.trainer.n_training_steps, self.trainer.n_training_samples = one.n_training_steps, one.n_training_samples
        logger.info("resuming from step %d", one.n_training_steps)
        return True


_COUNTS = (
    "n_training_steps",
    "n_training_samples",
    "started_fine_tuning",
    "act_freq_scores",
    "n_forward_passes_since_fired",
    "n_frac_active_samples",
)


def _state(trainer: Any) -> dict[str, Any]:
    """The state of one of sae-lens' trainers: weights, optimizer, schedules, scaling, counts, and our generator."""
    scaler = trainer.activation_scaler
    return {
        "weights": dict(trainer.sae.state_dict()),
        "noise": trainer.sae.generator.get_state() if isinstance(trainer.sae, Learning) else None,
        "optimizer": trainer.optimizer.state_dict(),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()},
        "scaling": scaler.scaling_factor,
        "whitening": None if scaler.whitening is None else vars(scaler.whitening),
        **{name: getattr(trainer, name) for name in _COUNTS},
    }


def _restore(trainer: Any, state: dict[str, Any]) -> None:
    sae: TrainingSAE[Any] = trainer.sae
    device = sae.device
    sae.load_state_dict(state["weights"])
    if isinstance(sae, Learning):
        sae.generator.set_state(state["noise"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, one in trainer.coefficient_schedulers.items():
        one.load_state_dict(state["coefficients"][name])
    trainer.activation_scaler.scaling_factor = state["scaling"]
    whitening = state["whitening"]
    trainer.activation_scaler.whitening = None if whitening is None else ActivationWhitening(**whitening)
    for name in _COUNTS:
        value = state[name]
        setattr(trainer, name, value.to(device) if isinstance(value, Tensor) else value)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; its tensors go to `tensors`, numbered."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):  # pairs, as JSON would turn the optimizer's numbers into text
        return {"pairs": [[key, _packed(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_packed(one, tensors) for one in value]}
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "pairs":
        return {key: _unpacked(one, tensors) for key, one in inside}
    return [_unpacked(one, tensors) for one in inside]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(x: Float[Tensor | Rows, "n d"]) -> str:
    """A hash of the shape of activations and of up to 4,096 rows spread over them."""
    rows = x[torch.arange(0, len(x), max(1, len(x) // 4096), device=x.device)].float().cpu().contiguous()
    return hashlib.sha256(str(tuple(x.shape)).encode() + rows.numpy().tobytes()).hexdigest()
