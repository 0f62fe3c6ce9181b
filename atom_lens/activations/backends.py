"""What a backend is: something that runs token ids and gives back the activations at named hook points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BackendName = Literal["auto", "transformer_lens", "nnsight"]


@runtime_checkable
class Backend(Protocol):
    """A model with hooks. Hook names are TransformerLens' on every backend."""

    n_layers: int
    n_ctx: int
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def hooks(self) -> list[str]:
        """All hook names, in the order of the layers."""
        ...

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        """One forward pass, stopped after the last layer in `hooks`: hook -> (batch, pos, width)."""
        ...
