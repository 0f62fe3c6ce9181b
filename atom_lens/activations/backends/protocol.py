"""What a backend is: it runs a model on token ids, and reads and replaces activations at named hook points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from atom_lens.errors import AtomLensError

# Takes the activations (batch, pos, ...) of one forward pass and the number of tokens that its KV cache already held;
# returns what replaces them, or None to leave them.
Change = Callable[[Tensor, int], Tensor | None]

# Takes the name of a hook and its activations (batch, pos, ...) during the forward pass, and returns a copy of what is
# needed of them: the model may change them in place later.
Take = Callable[[str, Tensor], Tensor]

# A module, and whether a hook is its first input or its output.
Site = tuple[torch.nn.Module, Literal["input", "output"]]


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
        """Whether a forward pass started before this call is running (an nnsight trace)."""
        ...

    def run(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hooks: Sequence[str], take: Take
    ) -> dict[str, Tensor]:
        """One forward pass without dropout, stopped after the last of `hooks`: hook -> what `take` returned for it.

        Raises:
            AtomLensError: something else has replaced a hook, or its values are not per token.
        """
        ...

    def logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], keep: int
    ) -> Float[Tensor, "batch keep vocab"]:
        """Logits, without dropout, at the last `keep` columns of a batch that is padded on the left; gradients flow."""
        ...

    def attach(self, hook: str, change: Change) -> Callable[[], None]:
        """Let `change` act at `hook` in every forward pass, however started, until the returned function is called.

        Raises:
            AtomLensError: something else has replaced this hook. In a forward pass: its values are not per token, or it
                does not fire.
        """
        ...


class Library(NamedTuple):
    """A library that runs models.

    Attributes:
        from_transformers: a backend around a loaded transformers model, its tokenizer and its name.
        wrap: the backend of a model of this library, None for anything else.
    """

    from_transformers: Callable[[Any, Any, str], Backend]
    wrap: Callable[[Any], Backend | None]


# By their names in recipes; each backend's file adds itself.
BACKENDS: dict[str, Library] = {}


class _AllRead(Exception):
    """Everything asked for has been read."""


def read_at(
    sites: Mapping[str, Site], take: Take, tokens: Int[Tensor, "batch pos"], forward: Callable[[], Any]
) -> dict[str, Tensor]:
    """What `take` returns at each of `sites` while `forward` runs on `tokens`, up to the last of them."""
    kept: dict[str, Tensor] = {}

    def keep(hook: str, value: Tensor) -> None:
        kept[hook] = take(hook, by_token(hook, value, tokens.shape))
        if len(kept) == len(sites):
            # Not by a layer to stop at: after its last layer a model would still run the unembedding, which can cost
            # more than all layers together.
            raise _AllRead

    handles = [on_site(site, partial(keep, hook)) for hook, site in sites.items()]
    try:
        with torch.no_grad(), suppress(_AllRead):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def on_site(site: Site, act: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """A torch hook that calls `act` with the tensor at `site` and replaces it by what that returns, unless None."""

    def on_output(module: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return act(output)
        changed = act(output[0])  # attention, and the blocks of transformers 4, return tuples
        return None if changed is None else (changed, *output[1:])

    def on_input(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
        changed = act(args[0] if args else kwargs[name])
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, name: changed})

    module, side = site
    if side == "output":
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def by_token(hook: str, value: Tensor, size: Sequence[int]) -> Tensor:
    """The values of a hook as (batch, pos, ...): some models flatten the two (OPT's MLP, routers of experts).

    Args:
        hook: its name.
        value: the tensor found there.
        size: (batch, pos) of the forward pass.

    Raises:
        AtomLensError: anything else, such as attention patterns, or a table of positions shared by all prompts.
    """
    # With one prompt a table of rotary positions has the shape of activations.
    if not hook.endswith((".hook_cos", ".hook_sin")):
        if value.ndim >= 3 and value.shape[:2] == tuple(size):
            return value
        if value.ndim == 2 and len(value) == size[0] * size[1]:
            return value.unflatten(0, tuple(size))
    raise AtomLensError(
        f"hook {hook!r} has shape {tuple(value.shape)} for {size[0]} prompts of {size[1]} tokens, "
        "allowed are activations (batch, pos, width) or (batch * pos, width)"
    )


class Passes:
    """The forward passes of a model, and a change that acts in each of them until `end`.

    Args:
        hook: where the change acts.
        change: what it does.
        entry: the module that a pass starts with, called with the KV cache.
    """

    def __init__(self, hook: str, change: Change, entry: torch.nn.Module) -> None:
        self._hook, self._change = hook, change
        self._size, self._past, self._fired = None, 0, True
        self._handles = [
            entry.register_forward_pre_hook(self._begin, with_kwargs=True),
            entry.register_forward_hook(self._check),
        ]

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self._size = next((value.shape[:2] for value in given if isinstance(value, Tensor)), None)
        self._past, self._fired = cached_tokens(kwargs), False

    def _check(self, module: Any, args: Any, output: Any) -> None:
        if not self._fired:
            raise AtomLensError(f"hook {self._hook!r} is named by the model but never fires in its forward pass")

    def act(self, value: Tensor) -> Tensor | None:
        """Apply the change to the values of the hook."""
        self._fired = True
        changed = self._change(by_token(self._hook, value, self._size or value.shape[:2]), self._past)
        return None if changed is None else changed.reshape(value.shape)

    def end(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Put modules in eval mode (no dropout), and each back into its own mode afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def forward_arguments(model: torch.nn.Module, mask: Int[Tensor, "batch pos"], keep: int) -> dict[str, Any]:
    """Arguments of a transformers model, apart from tokens, for a batch that is padded on the left.

    Position ids count real tokens: models with learned positions do not derive them from the mask. The unembedding can
    cost more than all layers together, so only the columns needed go through it.
    """
    known = inspect.signature(model.forward).parameters
    wanted = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "logits_to_keep": keep, "use_cache": False}
    return {"attention_mask": mask} | {name: value for name, value in wanted.items() if name in known}


def cached_tokens(arguments: Mapping[str, Any]) -> int:
    """Number of tokens in the KV cache that a transformers model, or a HookedTransformer's block, is called with."""
    if (position := arguments.get("cache_position")) is not None:
        return int(position[0])
    if (cache := arguments.get("past_key_values")) is not None:
        return int(cache.get_seq_length())
    entry = arguments.get("past_kv_cache_entry")
    return 0 if entry is None else int(entry.past_keys.shape[1])
