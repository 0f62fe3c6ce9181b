"""What a backend is: something that runs token ids and gives back the activations at named hook points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atom_lens.activations.models import ModelSource, load_model

BackendName = Literal["auto", "transformer_lens", "nnsight"]


@runtime_checkable
class Backend(Protocol):
    """A model with hooks. Hook names are TransformerLens' on every backend."""

    n_layers: int
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


def pick_device(device: str) -> str:
    """Resolve "auto" to the accelerator, if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_backend(source: ModelSource, backend: BackendName, dtype: torch.dtype, device: str) -> Backend:
    """Load a model under a backend; "auto" is TransformerLens where it knows the architecture, else nnsight."""
    from atom_lens.activations import nnsight_backend, transformer_lens_backend

    if backend not in get_args(BackendName):
        raise ValueError(f"backend is {backend!r}, allowed are {', '.join(get_args(BackendName))}")
    model, tokenizer = load_model(source, dtype, pick_device(device))
    if backend == "auto":
        known = transformer_lens_backend.knows(model)
        backend = "transformer_lens" if known else "nnsight"
    module = transformer_lens_backend if backend == "transformer_lens" else nnsight_backend
    return module.from_transformers(model, tokenizer, source.name)


def wrap_backend(model: Any) -> Backend:
    """The backend of a model that is already loaded: a bridge, a HookedTransformer, or an nnsight model."""
    from atom_lens.activations import nnsight_backend, transformer_lens_backend

    for module in (transformer_lens_backend, nnsight_backend):
        wrapped = module.wrap(model)
        if wrapped is not None:
            return wrapped
    raise ValueError(
        f"a {type(model).__name__} is not a model with hooks, allowed are a name, a TransformerBridge, "
        "a HookedTransformer and an nnsight model"
    )
