"""Activations through TransformerLens: `TransformerBridge` (any architecture it adapts) and `HookedTransformer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from atom_lens.activations.backends import Backend, Change, cached_tokens, forward_arguments
from atom_lens.activations.hooks import component_hooks, layer_of

# TransformerLens removes hooks by the level of the context that added them; its own levels count from 0.
_LEVELS = count(1 << 20)


class _Read(Exception):
    """All that was asked for is read."""


class TransformerLensBackend:
    """Hooks of a TransformerLens model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.n_layers: int = model.cfg.n_layers
        self.n_ctx: int = model.cfg.n_ctx
        known = model.hook_dict  # built anew at every access
        points = {name: name for name in known}
        if isinstance(model, TransformerBridge):
            for layer, block in enumerate(model.blocks):
                # The bridge's own names stay first; an alias counts where its target is a hook point.
                for alias, target in component_hooks(block).items():
                    if f"blocks.{layer}.{target}" in known:
                        points.setdefault(f"blocks.{layer}.{alias}", f"blocks.{layer}.{target}")
        # An attached sae-lens SAE stands in the place of its hook point: named, so that `attach` can say so.
        points |= {name: name for name in getattr(model, "acts_to_saes", {})}
        self._points = {name: point for name, point in points.items() if name.startswith("blocks.")}
        self.hooks = list(self._points)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
            def hook_fn(module: Any, args: Any, output: Tensor) -> None:
                kept[name] = output
                if len(kept) == len(hooks):
                    # Here, not by stop_at_layer: after its last layer a bridge would run the unembedding all the same,
                    # which can cost more than all layers together.
                    raise _Read

            return hook_fn

        # Not through run_with_hooks, which builds the table of all hook points anew for every hook.
        points = self.model.hook_dict
        handles = [points[self._points[name]].register_forward_hook(keep(name)) for name in hooks]
        try:
            with torch.no_grad(), suppress(_Read):
                self.model(tokens, attention_mask=mask)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    @property
    def tracing(self) -> bool:
        return False

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        if not isinstance(self.model, TransformerBridge):
            return self.model(tokens, attention_mask=mask, padding_side="left")[:, -keep:]
        return self.model(tokens, **forward_arguments(self.model.original_model, mask, keep))[:, -keep:]

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        point = self.model.hook_dict.get(self._points[hook])
        if not isinstance(point, HookPoint):
            raise ValueError(f"an sae-lens SAE is attached at hook {hook!r}: take it off with reset_saes() first")
        past, level = 0, next(_LEVELS)

        def note_past(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal past
            past = cached_tokens(kwargs)

        # A bridge hands its cache to the transformers model, a HookedTransformer to each of its blocks.
        entry = (
            self.model.original_model
            if isinstance(self.model, TransformerBridge)
            else self.model.blocks[layer_of(hook)]
        )
        noting = entry.register_forward_pre_hook(note_past, with_kwargs=True)
        # Permanent: reset_hooks(), which many notebooks call, would take it off in the middle of a block.
        point.add_hook(lambda tensor, *, hook: change(tensor, past), is_permanent=True, level=level)

        def detach() -> None:
            noting.remove()
            for handle in [handle for handle in point.fwd_hooks if handle.context_level == level]:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)

        return detach


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """A bridge around a loaded transformers model (whose modules it takes over)."""
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
    )
    return TransformerLensBackend(bridge)


def wrap(model: Any) -> Backend | None:
    """The backend of a TransformerLens model, or None for anything else."""
    return TransformerLensBackend(model) if isinstance(model, TransformerBridge | HookedTransformer) else None
