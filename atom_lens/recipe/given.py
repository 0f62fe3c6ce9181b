"""Activations that a recipe takes from a file, instead of a model that reads prompts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, load_from_disk
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atom_lens.activations.harvest import Harvest
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.geometry import check_rows
from atom_lens.recipe.recipe import Recipe
from atom_lens.storage.text import existing, lines_of, read_text
from atom_lens.tensors.rows import scratch


def given_prompts(recipe: Recipe) -> list[Prompt]:
    """For every row a placeholder prompt with its subject or document; no text was read."""
    path = Path(str(recipe.activations))
    if recipe.split.groups is not None:
        names = lines_of(read_text(existing(recipe.split.groups)).removesuffix("\n"))
        if "" in names:
            raise AtomLensError(f"split.groups has an empty line, {names.index('') + 1}: every row needs its group")
    else:  # named by their values, whatever the file is called; rows of one context stay on one side of a split
        rows = next(iter(_matrices(recipe).values()))
        together = _column(_dataset(path), recipe.hooks)[1][0] if path.is_dir() else 1
        contexts = [blake2b(some.numpy().tobytes(), digest_size=8).hexdigest() for some in rows.split(together)]
        names = [f"row {name}" for name in contexts for _ in range(together)]
    return [Prompt(name, document=name) for name in names]


def given_activations(recipe: Recipe, prompts: Sequence[Prompt]) -> Harvest:
    """The given activations, a row for each of the `given_prompts`.

    Raises:
        AtomLensError: no such file, a file that holds something else, rows that are not finite, hooks that are not in
            it, or a number of groups that is not that of rows.
    """
    found = Harvest()
    found.from_store = True
    for hook, matrix in _matrices(recipe).items():
        x = check_rows(matrix, f"{recipe.activations}, {hook}")
        if len(x) != len(prompts):
            raise AtomLensError(f"split.groups has {len(prompts)} lines, {recipe.activations} has {len(x)} rows")
        places = torch.stack([torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long)], dim=1)
        found.add(hook, x, places, recipe.massive_ratio)
    return found


def _matrices(recipe: Recipe) -> dict[str, Float[Tensor, ...]]:
    """hook -> its rows, mapped from the file if they are float32."""
    path, hooks = Path(str(recipe.activations)), recipe.hooks
    if not path.exists():
        raise AtomLensError(f"key activations is {str(path)!r}: there is no such file or folder")
    try:
        if path.is_dir():
            return _cached(path, hooks)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = _chosen(list(file.keys()), hooks)
                return {hook: file.get_tensor(name).float() for hook, name in zip(hooks, names, strict=True)}
        if path.suffix == ".npy":
            _chosen(["activations"], hooks)
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            return {hooks[0]: torch.from_numpy(array.astype(np.float32, copy=False))}
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        if isinstance(error, AtomLensError):
            raise
        raise AtomLensError(f"key activations is {str(path)!r}, which holds no activations: {error}") from error
    raise AtomLensError(
        f"key activations is {str(path)!r}, allowed are .npy, .safetensors, or a folder of sae-lens' cached activations"
    )


def _chosen(names: list[str], hooks: list[str]) -> list[str]:
    """The matrix of every hook; one matrix and one hook belong together, whatever their names."""
    if len(names) == len(hooks) == 1:
        return names
    if missing := [hook for hook in hooks if hook not in names]:
        raise AtomLensError(f"key hooks has {missing[0]!r}, the given activations have {', '.join(names) or 'none'}")
    return hooks


def _dataset(folder: Path) -> Dataset:
    """What sae-lens' CacheActivationsRunner wrote: a row per context, of shape (context, d)."""
    try:
        data = load_from_disk(str(folder))
    except OSError as error:
        raise AtomLensError(f"key activations is {str(folder)!r}, which holds no activations: {error}") from error
    if not isinstance(data, Dataset):
        raise AtomLensError(f"key activations is {str(folder)!r}, a {type(data).__name__}: allowed is one data set")
    return data


def _column(data: Dataset, hooks: list[str]) -> tuple[list[str], tuple[int, int]]:
    """The columns of the hooks, and the shape of a context."""
    names = _chosen([name for name, one in data.features.items() if isinstance(one, Array2D)], hooks)
    return names, data.features[names[0]].shape


def _cached(folder: Path, hooks: list[str]) -> dict[str, Float[Tensor, "n d"]]:
    data = _dataset(folder)
    found = {}
    for hook, name in zip(hooks, _column(data, hooks)[0], strict=True):
        context, width = data.features[name].shape
        found[hook] = scratch(len(data) * context, width)
        at = 0
        batch: Any
        for batch in data.select_columns(name).with_format("torch").iter(256):
            rows = batch[name].flatten(0, 1).float()
            found[hook][at : at + len(rows)] = rows
            at += len(rows)
    return found
