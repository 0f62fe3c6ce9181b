"""From the name of a model, or a loaded model, to the backend that reads it."""

from __future__ import annotations

from typing import Any, get_args

import torch
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

from atom_lens.activations.backends import BACKENDS, BackendName
from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.models import DTYPES, ModelSource, find_model, load_model, pick_device
from atom_lens.errors import AtomLensError


def open_backend(source: ModelSource, backend: BackendName, dtype: torch.dtype, device: str) -> Backend:
    """Load a model under a backend; "auto" is TransformerLens."""
    if backend not in get_args(BackendName):
        raise AtomLensError(f"backend is {backend!r}, allowed are {', '.join(get_args(BackendName))}")
    model, tokenizer = load_model(source, dtype, pick_device(device))
    library = BACKENDS["transformer_lens" if backend == "auto" else backend]
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        # Both backends take hook names from TransformerLens' adapters.
        raise AtomLensError(f"TransformerLens has no adapter for {type(model).__name__} of model {source.name!r}")
    return library.from_transformers(model, tokenizer, source.name)


def open_model(
    name: str,
    backend: BackendName = "auto",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> Any:
    """A live model to run, harvest from and splice into: a TransformerBridge, or with "nnsight" an nnsight model.

    Args:
        name: as of `harvest`: Hub id, folder, ``.gguf``, or ``demo:gemma-3-270m``.
        backend: "transformer_lens", "nnsight", or "auto" (TransformerLens).
        revision, dtype, device: how it is loaded; eager attention, so that both backends compute the same.

    Raises:
        AtomLensError: an unknown model, backend or dtype, or an architecture that TransformerLens has no adapter for.
    """
    if dtype not in DTYPES:
        raise AtomLensError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    device = pick_device(device)  # before any model is downloaded or converted
    opened: Any = open_backend(find_model(name, revision), backend, DTYPES[dtype], device)
    return opened.model


def wrap_backend(model: Any) -> Backend:
    """The backend of a model that is already loaded: a bridge, a HookedTransformer, an nnsight model; or itself."""
    if isinstance(model, Backend):
        return model
    for library in BACKENDS.values():
        if (wrapped := library.wrap(model)) is not None:
            return wrapped
    raise AtomLensError(
        f"a {type(model).__name__} is not a model with hooks, allowed are a name, a TransformerBridge, "
        "a HookedTransformer and an nnsight model"
    )
