"""What a step of sae-lens' trainer does more often than it has to: whitening, and going through the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override


class _Whitened:
    """One whitening, and the last batch that went through it."""

    def __init__(self, stream: str, whitening: ActivationWhitening) -> None:
        self.stream, self.whitening = stream, whitening
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, batch: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not batch:
            self._last = batch, ActivationScaler(whitening=self.whitening).scale(batch)
        return self._last[1]


class _SharedScaler(ActivationScaler):
    """A scaler that whitens through a `_Whitened`, until its own whitening is folded into the weights."""

    def __init__(self, shared: _Whitened) -> None:
        super().__init__(whitening=shared.whitening)
        self.shared = shared

    @override
    def scale(self, acts: Tensor) -> Tensor:
        return super().scale(acts) if self.whitening is None else self.shared.of(acts)


def whiten_once(
    trainers: Mapping[str, SAETrainer[Any, Any]], whitenings: Mapping[str, tuple[str, ActivationWhitening | None]]
) -> None:
    """Give trainers their whitening; those that have the same one on the same stream have each batch whitened once.

    Args:
        trainers: by name.
        whitenings: by name, the stream and the whitening, or None where the trainer is to estimate its own.
    """
    known: list[_Whitened] = []
    for name, (stream, whitening) in whitenings.items():
        if whitening is None:
            continue
        same = [one for one in known if one.stream == stream and torch.equal(one.whitening.matrix, whitening.matrix)]
        shared = same[0] if same else _Whitened(stream, whitening)
        known += [] if same else [shared]
        trainers[name].activation_scaler = _SharedScaler(shared)


def fuse(trainer: SAETrainer[Any, Any]) -> None:
    """Adam in one pass over the weights instead of nine; the same numbers up to rounding.

    It goes through memory: weights that lie transposed (W_enc of a sparse step) are given to it as they lie.
    """
    lying = [(p, torch.nn.Parameter(p.detach().T)) for p in trainer.sae.parameters() if not p.is_contiguous()]

    def hand_over(*_: Any) -> None:
        for weights, alias in lying:
            alias.grad = None if weights.grad is None else weights.grad.T
            weights.grad = None

    for group in trainer.optimizer.param_groups:
        group["fused"] = True
        group["params"] = [next((alias for one, alias in lying if one is p), p) for p in group["params"]]
    trainer.optimizer.register_step_pre_hook(hand_over)
