"""Activations through TransformerLens: `TransformerBridge` (any architecture it adapts) and `HookedTransformer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from atom_lens.activations.backends import Backend
from atom_lens.activations.hooks import component_hooks, layer_of

_AFTER_LAYERS = "ln_final.hook_in"


def _stop(value: Tensor, hook: Any) -> None:
    raise StopAtLayerException(value)


class TransformerLensBackend:
    """Hooks of a TransformerLens model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.n_layers: int = model.cfg.n_layers
        self.n_ctx: int = model.cfg.n_ctx
        names = list(model.hook_dict)
        if isinstance(model, TransformerBridge):
            for layer, block in enumerate(model.blocks):
                aliases = component_hooks(block)
                # The bridge's own names stay first; an alias counts where its target is a hook point.
                names += [
                    f"blocks.{layer}.{alias}"
                    for alias, target in aliases.items()
                    if f"blocks.{layer}.{target}" in model.hook_dict
                ]
        self.hooks = list(dict.fromkeys(name for name in names if name.startswith("blocks.")))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook_fn(value: Tensor, hook: Any) -> None:
                kept[name] = value

            return hook_fn

        fwd_hooks: list[Any] = [(name, keep(name)) for name in hooks]
        if isinstance(self.model, TransformerBridge) and _AFTER_LAYERS in self.model.hook_dict:
            # Asked to stop after its last layer the bridge runs the unembedding all the same, which can cost more
            # than all layers together.
            fwd_hooks.append((_AFTER_LAYERS, _stop))
        with torch.no_grad():
            self.model.run_with_hooks(
                tokens, attention_mask=mask, fwd_hooks=fwd_hooks, stop_at_layer=max(map(layer_of, hooks)) + 1
            )
        return kept


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """A bridge around a loaded transformers model (whose modules it takes over)."""
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
    )
    return TransformerLensBackend(bridge)


def wrap(model: Any) -> Backend | None:
    """The backend of a TransformerLens model, or None for anything else."""
    return TransformerLensBackend(model) if isinstance(model, TransformerBridge | HookedTransformer) else None
