"""Activations on disk: a Hugging Face `datasets` folder under a key of all that they depend on, whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, load_from_disk
from jaxtyping import Float, Int
from torch import Tensor

from atom_lens._files import locked, new_folder, read_json, sweep, write_json
from atom_lens.activations.models import ModelSource
from atom_lens.activations.prompts import Prompt

_FORMAT = 2


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
    """Changes with anything that the activations depend on."""
    about = {
        "format": _FORMAT,
        "model": source.fingerprint,
        "revision": source.revision,
        "prompts": [asdict(prompt) for prompt in prompts],
        "hooks": list(hooks),
        "positions": positions,
        "dtype": str(dtype),
        "max_tokens": max_tokens,
        "backend": backend,
        "prepend_bos": prepend_bos,
        "unique": unique,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


# Rows, activations by hook, and what is known about them.
Stored = tuple[Tensor, dict[str, Tensor], dict[str, Any]]


def stored(folder: Path, make: Callable[[], Stored]) -> tuple[Stored, bool]:
    """What `folder` keeps, or else what `make` gives, kept from now on; True where nothing had to be made."""
    if not folder.is_dir():
        with locked(folder, wait=True):  # whoever comes second waits, and reads what the first has written
            if not folder.is_dir():
                sweep(folder.parent, folder.name)
                made = make()
                write_store(folder, *made)
                return made, False
    return read_store(folder), True


def write_store(
    folder: Path,
    rows: Int[Tensor, "n 2"],
    activations: dict[str, Float[Tensor, "n _"]],
    about: dict[str, Any],
) -> None:
    """Save activations, hook -> (n, d), and the (prompt, token) that each row was read at."""
    columns = {"prompt": pa.array(rows[:, 0].numpy()), "token": pa.array(rows[:, 1].numpy())}
    for hook, x in activations.items():
        # Fixed-size lists over the tensor's own memory: no copy, and Arrow keeps the width.
        columns[hook] = pa.FixedSizeListArray.from_arrays(pa.array(x.contiguous().flatten().numpy()), x.shape[1])
    dataset = Dataset(pa.table(columns))
    with new_folder(folder) as temporary:
        dataset.save_to_disk(temporary)
        write_json(temporary / "about.json", about)


def read_store(folder: Path) -> tuple[Int[Tensor, "n 2"], dict[str, Float[Tensor, "n _"]], dict[str, Any]]:
    """What `write_store` saved: rows, activations, about."""
    dataset = load_from_disk(folder).with_format("numpy")
    assert isinstance(dataset, Dataset)
    rows = torch.from_numpy(np.stack([dataset["prompt"][:], dataset["token"][:]], axis=1)).long()
    hooks = [name for name in dataset.column_names if name not in ("prompt", "token")]
    about = read_json(folder / "about.json")
    return rows, {hook: torch.from_numpy(np.array(dataset[hook][:])) for hook in hooks}, about
