"""A faster optimizer step for sae-lens' trainer: fewer passes over the weights."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.training.sae_trainer import SAETrainer


def fuse(trainer: SAETrainer[Any, Any]) -> None:
    """Run Adam in one pass over the weights instead of nine; results are the same up to rounding.

    Fused Adam needs contiguous tensors: weights stored transposed (W_enc of a sparse step) are passed as transposes.
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
