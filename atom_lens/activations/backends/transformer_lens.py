"""Activations through TransformerLens: `TransformerBridge` (any architecture it adapts) and `HookedTransformer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from atom_lens.activations.backends.protocol import (
    BACKENDS,
    Backend,
    Change,
    Library,
    Passes,
    Site,
    Take,
    evaluating,
    forward_arguments,
    read_at,
)
from atom_lens.activations.hooks import component_hooks, layer_of
from atom_lens.errors import AtomLensError

# TransformerLens removes hooks by the level of the context that added them; its own levels count from 0.
_LEVELS = count(1 << 20)


class TransformerLensBackend:
    """Hooks of a TransformerLens model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.n_layers: int = model.cfg.n_layers
        self.n_ctx: int = model.cfg.n_ctx
        known = model.hook_dict  # rebuilt at every access
        points = {name: name for name in known}
        if isinstance(model, TransformerBridge):
            for layer, block in enumerate(model.blocks):
                # The bridge's own names take precedence; an alias counts if its target is a hook point.
                for alias, target in component_hooks(block).items():
                    if f"blocks.{layer}.{target}" in known:
                        points.setdefault(f"blocks.{layer}.{alias}", f"blocks.{layer}.{target}")
        # An attached sae-lens SAE replaces its hook point: it is listed, so that `attach` can say so.
        points |= {name: name for name in getattr(model, "acts_to_saes", {})}
        self._points = {name: point for name, point in points.items() if name.startswith("blocks.")}
        self.hooks = list(self._points)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _modules(self) -> list[torch.nn.Module]:
        """The modules that have a mode: a bridge holds the transformers model, but not as a submodule."""
        return [self.model, *([self.model.original_model] if isinstance(self.model, TransformerBridge) else [])]

    def _point(self, hook: str, points: Mapping[str, Any]) -> HookPoint:
        point = points.get(self._points[hook])
        if not isinstance(point, HookPoint):
            raise AtomLensError(f"an sae-lens SAE is attached at hook {hook!r}: detach it with reset_saes() first")
        return point

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str], take: Take
    ) -> dict[str, Tensor]:
        # Not through run_with_hooks, which rebuilds the table of all hook points for every hook.
        points = self.model.hook_dict
        sites: dict[str, Site] = {name: (self._point(name, points), "output") for name in hooks}
        with evaluating(*self._modules):
            return read_at(sites, take, tokens, lambda: self.model(tokens, attention_mask=mask))

    @property
    def tracing(self) -> bool:
        return False

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        with evaluating(*self._modules):
            if not isinstance(self.model, TransformerBridge):
                return self.model(tokens, attention_mask=mask, padding_side="left")[:, -keep:]
            return self.model(tokens, **forward_arguments(self.model.original_model, mask, keep))[:, -keep:]

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        point, level = self._point(hook, self.model.hook_dict), next(_LEVELS)
        # A bridge passes its cache to the transformers model, a HookedTransformer to each of its blocks.
        entry = (
            self.model.original_model
            if isinstance(self.model, TransformerBridge)
            else self.model.blocks[layer_of(hook)]
        )
        passes = Passes(hook, change, entry)
        # Permanent: reset_hooks(), which many notebooks call, would otherwise remove it inside a with block.
        point.add_hook(lambda tensor, *, hook: passes.act(tensor), is_permanent=True, level=level)

        def detach() -> None:
            passes.end()
            for handle in [handle for handle in point.fwd_hooks if handle.context_level == level]:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)

        return detach


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """A bridge around a loaded transformers model, whose modules it takes over."""
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device=model.device, dtype=model.dtype
    )
    return TransformerLensBackend(bridge)


def wrap(model: Any) -> Backend | None:
    """The backend of a TransformerLens model, or None for anything else."""
    return TransformerLensBackend(model) if isinstance(model, TransformerBridge | HookedTransformer) else None


BACKENDS["transformer_lens"] = Library(from_transformers, wrap)
