"""Activations on disk: mapped safetensors files under a key of everything they depend on, whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atom_lens.activations.models import ModelSource
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.storage.files import locked, new_folder, read_json, sweep, write_json
from atom_lens.tensors import parallel

_FORMAT = 4
_ROWS, _ABOUT, _ACTIVATIONS, _NAME = "rows.safetensors", "about.json", ".activations.safetensors", "activations"


def store_key(
    source: ModelSource,
    prompts: Sequence[Prompt],
    hooks: Sequence[str],
    positions: str,
    dtype: torch.dtype,
    max_tokens: int,
    backend: str,
    prepend_bos: bool,
    unique: bool,
) -> str:
    """A key that changes with anything that the activations depend on."""
    about = {
        "format": _FORMAT,
        "model": source.fingerprint,
        "revision": source.revision,
        "prompts": [_read_of(prompt) for prompt in prompts],
        "hooks": list(hooks),
        "positions": positions,
        "dtype": str(dtype),
        "max_tokens": max_tokens,
        "backend": backend,
        "prepend_bos": prepend_bos,
        "unique": unique,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _read_of(prompt: Prompt) -> dict[str, Any]:
    """The parts of a prompt that activations depend on: not the document that its text was cut from."""
    return {name: value for name, value in asdict(prompt).items() if name != "document"}


# Rows, activations by hook, and what is known about them.
Stored = tuple[Tensor, dict[str, Tensor], dict[str, Any]]
# Makes an empty float32 matrix for the activations of a hook: name, rows, width.
Allocate = Callable[[str, int, int], Tensor]


def in_memory(hook: str, n: int, width: int) -> Float[Tensor, "n width"]:
    """An `Allocate` for activations that are not stored."""
    return torch.empty(n, width)


def stored(folder: Path, make: Callable[[Allocate], Stored]) -> tuple[Stored, bool]:
    """The content of `folder`, or what `make` returns, which is stored there; True where nothing had to be made.

    Activations are mapped from their files, and written there as they are made. Several processes that make them
    together fill their own rows.
    """
    if parallel.agreed(folder.is_dir):
        return read_store(folder), True
    with ExitStack() as stack:
        if parallel.rank() == 0:
            # A second process waits, and reads what the first has written.
            stack.enter_context(locked(folder, wait=True))
        found = parallel.agreed(folder.is_dir)
        if not found:
            temporary = None
            if parallel.rank() == 0:
                sweep(folder.parent, folder.name)
                temporary = stack.enter_context(new_folder(folder))
            temporary = Path(parallel.agreed(lambda: str(temporary)))
            rows, _, about = make(partial(_allocate, temporary))
            parallel.together()
            if parallel.rank() == 0:
                save_file({"rows": rows}, temporary / _ROWS)
                write_json(temporary / _ABOUT, about)
    parallel.together()
    return read_store(folder), found


def _allocate(folder: Path, hook: str, n: int, width: int) -> Float[Tensor, "n width"]:
    """A safetensors file of one matrix, mapped to be filled; its space is reserved now: no later write fails."""
    size = 4 * n * width
    header = json.dumps({_NAME: {"dtype": "F32", "shape": [n, width], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    file = folder / f"{hook}{_ACTIVATIONS}"
    handle = os.open(file, os.O_RDWR | os.O_CREAT)  # the same bytes, whichever process comes first
    try:
        os.write(handle, len(header).to_bytes(8, "little") + header)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, 8 + len(header) + size)
        else:  # macOS and Windows
            os.ftruncate(handle, 8 + len(header) + size)
    finally:
        os.close(handle)
    return torch.from_numpy(np.memmap(file, np.float32, "r+", offset=8 + len(header), shape=(n, width)))


def read_store(folder: Path) -> Stored:
    """What `stored` wrote; the activations are mapped, not read."""
    activations = {}
    for file in sorted(folder.glob(f"*{_ACTIVATIONS}")):
        with safe_open(file, framework="pt") as opened:
            activations[file.name.removesuffix(_ACTIVATIONS)] = opened.get_tensor(_NAME)
    about = read_json(folder / _ABOUT)
    hooks = about.pop("hooks")
    return load_file(folder / _ROWS)["rows"], {hook: activations[hook] for hook in hooks}, about
