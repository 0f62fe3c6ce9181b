"""A recipe's activations, split into train and held-out rows, with no subject on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.harvest import Harvest, harvest
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.recipe.given import given_activations, given_prompts
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.running import beginnings, document_side
from atom_lens.tensors.checks import Labels, checked_seed, labels
from atom_lens.tensors.rows import Rows


def heldout_rows(groups: Labels, share: float, seed: int) -> Bool[Tensor, " n"]:
    """True for held-out rows: `share` of the distinct groups, drawn with `seed`, and at least one.

    Args:
        groups: the subject (or text) of every row.
        share: of the groups, above 0 and below 1.
        seed: of the draw.

    Raises:
        AtomLensError: fewer than two groups, a share or seed that is not allowed, or no labels.
    """
    names = labels(groups, None, "groups")
    if isinstance(share, bool) or not 0 < share < 1:
        raise AtomLensError(f"share is {share}, allowed is above 0 and below 1")
    distinct = list(dict.fromkeys(names))
    if len(distinct) < 2:
        raise AtomLensError(f"a split by subject needs at least 2 subjects, got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(checked_seed(seed))).tolist()
    n_heldout = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = {distinct[i] for i in order[:n_heldout]}
    return torch.tensor([group in chosen for group in names])


def prompts_of(recipe: Recipe) -> list[Prompt]:
    """The prompts whose activations a recipe keeps; for running text, the contexts of its first documents."""
    if recipe.activations is not None:
        return given_prompts(recipe)
    return recipe.source("a recipe").read() if recipe.stream is None else beginnings(recipe)


def harvest_for(recipe: Recipe, prompts: Sequence[Prompt], opened: Callable[[], Backend] | None = None) -> Harvest:
    """The activations that a recipe asks for, at the prompts of `prompts_of`; `opened` as of `harvest`."""
    if recipe.activations is not None:
        return given_activations(recipe, prompts)
    return harvest(
        recipe.model.name,
        prompts,
        recipe.hooks,
        recipe.positions,
        recipe.model.backend,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        device=recipe.model.device,
        massive_ratio=recipe.massive_ratio,
        prepend_bos=recipe.prepend_bos,
        unique=True,
        max_tokens=recipe.max_tokens if recipe.stream is None else recipe.stream.context_size,
        opened=opened,
    )


def sides(recipe: Recipe, groups: Sequence[str]) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """The held-out rows, and those for validation, from the subject or document of every row."""
    split = recipe.split
    if recipe.stream is not None:
        at = {group: document_side(split, group) for group in set(groups)}
        found = [at[group] for group in groups]
        return torch.tensor([side == "heldout" for side in found]), torch.tensor([s == "validation" for s in found])
    out = heldout_rows(groups, split.heldout, split.seed)
    aside = torch.zeros_like(out)
    if split.validation:
        rest = (~out).nonzero()[:, 0]
        aside[rest[heldout_rows([groups[i] for i in rest.tolist()], split.validation, split.seed)]] = True
    return out, aside


class SplitActivations(NamedTuple):
    """Activations of one hook, float32. No subject is in both parts.

    `subjects` are those of the held-out rows; `prompts` and `heldout_prompts` say which prompt each row comes from.
    `validation` has rows of subjects that are in neither part, None where the recipe asks for none.
    """

    x: Float[Rows, "n d"]
    heldout: Float[Rows, "m d"]
    subjects: list[str]
    prompts: list[int]
    heldout_prompts: list[int]
    validation: Float[Rows, "k d"] | None = None


def split_activations(recipe: Recipe, prompts: Sequence[Prompt], found: Harvest, hook: str) -> SplitActivations:
    """Train and held-out activations at one hook, split by subject."""
    which = found.rows[hook][:, 0]
    groups = [prompts[i].group for i in which.tolist()]
    out, aside = sides(recipe, groups)
    x = found.views[hook]
    d = x.shape[1]
    if int(out.sum()) < 2:
        raise AtomLensError(
            f"split.heldout is {recipe.split.heldout}, which holds out {int(out.sum())} of {len(x)} activations: at "
            "least 2 are needed"
        )
    subjects = [groups[i] for i in out.nonzero()[:, 0].tolist()]
    own = ~out & ~aside
    if int(own.sum()) < d and recipe.metric.ridge != "oas":
        raise AtomLensError(
            f"hook {hook!r} has {int(own.sum())} training activations of width {d}, the metric needs at least {d}: "
            "give more prompts, or metric.ridge=oas"
        )
    return SplitActivations(
        x.select(own),
        x.select(out),
        subjects,
        which[own].tolist(),
        which[out].tolist(),
        x.select(aside) if recipe.split.validation else None,
    )
