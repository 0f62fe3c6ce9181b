"""Activations through nnsight traces, under TransformerLens' hook names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import TransformersModel
from torch import Tensor

from atom_lens.activations.backends import Backend, Change, cached_tokens, forward_arguments
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

    def _site(self, hook: str) -> tuple[Any, str]:
        """The envoy that a hook belongs to, and whether the hook is its input or its output."""
        path, side = self.sites[hook]
        try:
            return self.envoy(path), side
        except AttributeError as error:
            raise ValueError(f"hook {hook!r} has no module of its own in this model: {error}") from error

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]:
        envoys = {name: self._site(name)[0] for name in hooks}
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

    @property
    def tracing(self) -> bool:
        return bool(self.model.interleaver.interleaving)

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        arguments = forward_arguments(self.model._module, mask, keep)
        with self.model.trace({"input_ids": tokens, **arguments}):
            found = self.model.output.logits.save()
        return found[:, -keep:]

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        # A hook of torch on the module: an edit of nnsight would act in traces only, and could not be taken back
        # without the user's own edits.
        envoy, side = self._site(hook)
        past = 0

        def note_past(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal past
            past = cached_tokens(kwargs)

        def on_output(module: Any, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output  # transformers 4 blocks return tuples
            changed = change(value, past)
            return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed

        def on_input(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            value = args[0] if args else kwargs["hidden_states"]
            changed = change(value, past)
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        module = envoy._module
        noting = self.model._module.register_forward_pre_hook(note_past, with_kwargs=True)
        changing = (
            module.register_forward_hook(on_output)
            if side == "output"
            else module.register_forward_pre_hook(on_input, with_kwargs=True)
        )

        def detach() -> None:
            noting.remove()
            changing.remove()

        return detach


def from_transformers(model: Any, tokenizer: Any, name: str) -> Backend:
    """An nnsight model around a loaded transformers model."""
    # Without a device its pipeline would move the model to the first GPU.
    return NNsightBackend(TransformersModel(model, tokenizer=tokenizer, device=model.device))


def wrap(model: Any) -> Backend | None:
    """The backend of an nnsight model, or None for anything else."""
    if not isinstance(model, TransformersModel):
        return None
    if not model.dispatched:
        model.dispatch()  # nnsight loads weights at the first trace; until then they are on no device
    return NNsightBackend(model)
