"""Contexts: the texts, and in them the tokens, at which a run's activations were read, and the units active there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.activations.models import find_model, load_tokenizer
from atom_lens.activations.positions import tokenised
from atom_lens.activations.prompts import Prompt
from atom_lens.dictionaries import Dictionary
from atom_lens.rows import Rows
from atom_lens.training.recipe import Recipe
from atom_lens.training.run import harvest_for
from atom_lens.training.split import heldout_rows


@dataclass(frozen=True)
class Corpus:
    """The activations of a recipe at one hook, in the order of its prompts, and where each was read.

    Attributes:
        x: shape (n, d).
        prompts: of the recipe.
        places: of each row the prompt, and the first and one past the last character of the token read, shape (n, 3).
        heldout: rows that no training saw, shape (n,).
    """

    x: Float[Rows, "n d"]
    prompts: list[Prompt]
    places: Int[Tensor, "n 3"]
    heldout: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.places)

    def prompt(self, row: int) -> Prompt:
        """What row `row` was read from."""
        return self.prompts[int(self.places[row, 0])]

    def span(self, row: int) -> tuple[int, int]:
        """The characters, in the text of its prompt, of the token that row `row` was read at."""
        _, start, end = self.places[row].tolist()
        return start, end


def corpus(recipe: Recipe, hook: str) -> Corpus:
    """What the units of `hook` of a run are read on: from the store, where the recipe has been run here.

    Raises:
        ValueError: the hook is not one of the recipe's.
    """
    prompts = recipe.prompts.read()
    found = harvest_for(recipe, prompts)
    if hook not in found:
        raise ValueError(f"hook is {hook!r}, allowed are the recipe's: {', '.join(found)}")
    rows = found.rows[hook]
    tokenizer = load_tokenizer(find_model(recipe.model.name, recipe.model.revision))
    texts = [prompt.text for prompt in prompts]
    offsets = [characters for _, characters in tokenised(tokenizer, texts, recipe.prepend_bos)]
    places = torch.tensor([[prompt, *offsets[prompt][token]] for prompt, token in rows.tolist()])
    groups = [prompts[prompt].group for prompt in rows[:, 0].tolist()]
    out = heldout_rows(groups, recipe.split.heldout, recipe.split.seed)
    return Corpus(found.views[hook], prompts, places, out)


@torch.no_grad()
def codes_of(dictionary: Dictionary, x: Float[Tensor | Rows, "n d"], batch: int = 1024) -> csc_array:
    """The codes of `x`, shape (n, F), by columns: a column holds the rows at which a unit is active, and how much."""
    rows, columns, values = [], [], []
    for start in range(0, len(x), batch):
        codes = dictionary.encode(x[start : start + batch].to(dictionary.W_dec.device)).cpu()
        row, column = codes.nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
        values.append(codes[row, column].float())
    at = tuple(torch.cat(part).numpy() for part in (rows, columns))
    return csc_array((torch.cat(values).numpy(), at), shape=(len(x), len(dictionary.W_dec)))


def active_rows(codes: csc_array, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows at which `unit` is active and its coefficients there, largest in size first."""
    rows = codes.indices[codes.indptr[unit] : codes.indptr[unit + 1]]
    values = codes.data[codes.indptr[unit] : codes.indptr[unit + 1]]
    order = np.argsort(-np.abs(values), kind="stable")
    return rows[order], values[order]
