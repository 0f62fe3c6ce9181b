"""Activations through nnsight traces, under TransformerLens' hook names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor

from atom_lens.activations.backends import Backend
from atom_lens.activations.hooks import layer_of, module_sites


class NNsightBackend:
    """Hooks of an nnsight model of a transformers language model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokenizer = model.tokenizer
        self.sites, self.n_layers, self.n_ctx = module_sites(model.config)
        self.hooks = list(self.sites)

    @property
    def device(self) -> torch.device:
        return next(self.model._module.parameters()).device

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of a module path like ``model.layers.9``."""
        node = self.model
        for part in path.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        return node

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        try:
            envoys = {name: self.envoy(self.sites[name][0]) for name in hooks}
        except AttributeError as error:
            raise ValueError(f"a hook of {', '.join(hooks)} has no module of its own in this model: {error}") from error
        last = self.envoy(self.sites[f"blocks.{max(map(layer_of, hooks))}.hook_out"][0])
        with torch.no_grad(), self.model.trace({"input_ids": tokens, "attention_mask": mask}) as tracer:
            # A cache takes modules in any order; reading them one by one would have to follow the forward pass.
            cache = tracer.cache(modules=list(envoys.values()), device=None, include_inputs=True)
            last.output  # noqa: B018 -- waits for the last layer, then stops
            tracer.stop()
        kept = {}
        for name, envoy in envoys.items():
            entry = cache[envoy.path]
            value = entry.input if self.sites[name][1] == "input" else entry.output
            kept[name] = value[0] if isinstance(value, tuple) else value  # transformers 4 blocks return tuples
        return kept


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """An nnsight model around a loaded transformers model."""
    return NNsightBackend(TransformersModel(model, tokenizer=tokenizer))


def wrap(model: Any) -> Backend | None:
    """The backend of an nnsight model, or None for anything else."""
    if not isinstance(model, TransformersModel):
        return None
    if not model.dispatched:
        model.dispatch()  # nnsight loads weights at the first trace; until then they are on no device
    return NNsightBackend(model)
