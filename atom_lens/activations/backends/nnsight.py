"""Activations through nnsight traces, under TransformerLens' hook names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor

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
    on_site,
    read_at,
)
from atom_lens.activations.hooks import module_sites
from atom_lens.errors import AtomLensError


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

    def _site(self, hook: str) -> Site:
        path, side = self.sites[hook]
        try:
            # Not by envoy: one named `output` (BERT has such modules) has another name there.
            return self.model._module.get_submodule(path), side
        except AttributeError as error:
            raise AtomLensError(f"hook {hook!r} has no module of its own in this model: {error}") from error

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str], take: Take
    ) -> dict[str, Tensor]:
        # By torch hooks: nnsight's cache keeps references, which models change in place, and is filled before the hooks
        # of an open splice act. As a trace, so that nnsight's edits act.
        sites = {name: self._site(name) for name in hooks}
        inputs = {"input_ids": tokens, "attention_mask": mask}
        with evaluating(self.model._module):
            return read_at(sites, take, tokens, lambda: self.model.trace(inputs, trace=False))

    @property
    def tracing(self) -> bool:
        return bool(self.model.interleaver.interleaving)

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        arguments = forward_arguments(self.model._module, mask, keep)
        with evaluating(self.model._module), self.model.trace({"input_ids": tokens, **arguments}):
            found = self.model.output.logits.save()
        return found[:, -keep:]

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        # A torch hook on the module: an nnsight edit would act in traces only, and could not be removed without
        # removing the user's own edits.
        site = self._site(hook)
        passes = Passes(hook, change, self.model._module)
        changing = on_site(site, passes.act)

        def detach() -> None:
            passes.end()
            changing.remove()

        return detach


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """An nnsight model around a loaded transformers model."""
    # Without a device, its pipeline would move the model to the first GPU.
    return NNsightBackend(TransformersModel(model, tokenizer=tokenizer, device=model.device))


def wrap(model: Any) -> Backend | None:
    """The backend of an nnsight model, or None for anything else."""
    if not isinstance(model, TransformersModel):
        return None
    if not model.dispatched:
        model.dispatch()  # nnsight loads weights at the first trace; until then they are on the meta device
    return NNsightBackend(model)


BACKENDS["nnsight"] = Library(from_transformers, wrap)
