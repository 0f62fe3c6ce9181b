"""Contexts: the texts, and the tokens in them, at which a run's activations were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atom_lens.activations.models import find_model, load_tokenizer
from atom_lens.activations.positions import tokenised
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.split import harvest_for, prompts_of, sides
from atom_lens.tensors.rows import Rows


@dataclass(frozen=True)
class Corpus:
    """Training and held-out activations at one hook, in the order of their prompts, and where each was read.

    Attributes:
        x: shape (n, d).
        prompts: what they were read from.
        places: for each row its prompt, and the first and one past the last character of the token read, shape (n, 3).
        heldout: rows that no training saw, shape (n,).
    """

    x: Float[Rows, "n d"]
    prompts: list[Prompt]
    places: Int[Tensor, "n 3"]
    heldout: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.places)

    def prompt(self, row: int) -> Prompt:
        """The prompt that row `row` was read from."""
        return self.prompts[int(self.places[row, 0])]

    def span(self, row: int) -> tuple[int, int]:
        """The characters, in the text of its prompt, of the token that row `row` was read at."""
        _, start, end = self.places[row].tolist()
        return start, end


def corpus(recipe: Recipe, hook: str) -> Corpus:
    """The activations at `hook` of a run and their texts; from the store, if the recipe was run here.

    Raises:
        AtomLensError: the hook is not one of the recipe's, or the recipe has activations and no texts.
    """
    recipe.source("what shows texts")
    prompts = prompts_of(recipe)
    found = harvest_for(recipe, prompts)
    if hook not in found:
        raise AtomLensError(f"hook is {hook!r}, allowed are the recipe's: {', '.join(found)}")
    rows = found.rows[hook]
    tokenizer = load_tokenizer(find_model(recipe.model.name, recipe.model.revision))
    groups = [prompts[prompt].group for prompt in rows[:, 0].tolist()]
    out, aside = sides(recipe, groups)
    places = places_of(rows[~aside], prompts, tokenizer, recipe.prepend_bos)
    return Corpus(found.views[hook].select(~aside), prompts, places, out[~aside])


def places_of(
    rows: Int[Tensor, "n 2"], prompts: Sequence[Prompt], tokenizer: Any, prepend_bos: bool
) -> Int[Tensor, "n 3"]:
    """`Corpus.places` of activations that were read at (prompt, token)."""
    texts = [prompt.text for prompt in prompts]
    offsets = [characters for _, characters in tokenised(tokenizer, texts, prepend_bos)]
    return torch.tensor([[prompt, *offsets[prompt][token]] for prompt, token in rows.tolist()])
