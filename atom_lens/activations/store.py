"""Activations on disk: a Hugging Face `datasets` folder under a key of all that they depend on, whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from jaxtyping import Float, Int
from torch import Tensor

from atom_lens._files import replacing_folder
from atom_lens.activations.models import ModelSource
from atom_lens.activations.prompts import Prompt

_FORMAT = 1


def store_key(
    source: ModelSource,
    prompts: Sequence[Prompt],
    hooks: Sequence[str],
    positions: str,
    dtype: torch.dtype,
    max_tokens: int,
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
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def write_store(
    folder: Path,
    rows: Int[Tensor, "n 2"],
    activations: dict[str, Float[Tensor, "n _"]],
    about: dict[str, Any],
) -> None:
    """Save activations, hook -> (n, d), and the (prompt, token) that each row was read at."""
    features: dict[str, Any] = {"prompt": Value("int32"), "token": Value("int32")}
    columns: dict[str, Any] = {"prompt": rows[:, 0].int().numpy(), "token": rows[:, 1].int().numpy()}
    for hook, x in activations.items():
        # Arrow has no bfloat16; float32 holds it exactly.
        array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
        features[hook] = List(Value(str(array.dtype)), length=array.shape[1])
        columns[hook] = array
    dataset = Dataset.from_dict(columns, features=Features(features))
    with replacing_folder(folder) as temporary:
        dataset.save_to_disk(temporary)
        (temporary / "about.json").write_text(json.dumps(about, indent=2))


def read_store(folder: Path) -> tuple[Int[Tensor, "n 2"], dict[str, Float[Tensor, "n _"]], dict[str, Any]]:
    """What `write_store` saved: rows, activations, about."""
    dataset = load_from_disk(folder).with_format("numpy")
    assert isinstance(dataset, Dataset)
    rows = torch.from_numpy(np.stack([dataset["prompt"][:], dataset["token"][:]], axis=1)).long()
    hooks = [name for name in dataset.column_names if name not in ("prompt", "token")]
    about = json.loads((folder / "about.json").read_text())
    return rows, {hook: torch.from_numpy(np.array(dataset[hook][:])) for hook in hooks}, about
