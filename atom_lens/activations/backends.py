"""What a backend is: something that runs token ids, and reads and replaces activations at named hook points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

BackendName = Literal["auto", "transformer_lens", "nnsight"]

# Gets the activations (batch, pos, ...) of one forward pass and the number of tokens that its KV cache already held;
# gives what stands in their place, or None to leave them.
Change = Callable[[Tensor, int], Tensor | None]


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

    @property
    def tracing(self) -> bool:
        """Whether a forward pass is running that was begun before this call (an nnsight trace)."""
        ...

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        """One forward pass, stopped after the last layer in `hooks`: hook -> (batch, pos, width)."""
        ...

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        """Logits at the last `keep` columns of a batch that is padded on the left; gradients flow."""
        ...

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        """Let `change` act at `hook` in every forward pass, however it is begun, until the returned function is called.

        Raises:
            ValueError: something else stands in the place of this hook.
        """
        ...


def forward_arguments(model: torch.nn.Module, mask: Int[Tensor, "batch pos"], keep: int) -> dict[str, Any]:
    """What a transformers model is told beside the tokens of a batch that is padded on the left.

    Position ids count real tokens: models with learned positions do not derive them from the mask. The unembedding can
    cost more than all layers together, so only the columns that are wanted go through it.
    """
    known = inspect.signature(model.forward).parameters
    wanted = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "logits_to_keep": keep, "use_cache": False}
    return {"attention_mask": mask} | {name: value for name, value in wanted.items() if name in known}


def cached_tokens(arguments: Mapping[str, Any]) -> int:
    """Tokens in the KV cache that a transformers model, or a block of a HookedTransformer, is called with."""
    if (position := arguments.get("cache_position")) is not None:
        return int(position[0])
    if (cache := arguments.get("past_key_values")) is not None:
        return int(cache.get_seq_length())
    entry = arguments.get("past_kv_cache_entry")
    return 0 if entry is None else int(entry.past_keys.shape[1])
