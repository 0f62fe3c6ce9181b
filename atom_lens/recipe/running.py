"""A recipe's running text: the side of the split that a document is on, the first contexts, the stream of all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.documents import all_prefixes, contexts
from atom_lens.activations.harvest import Harvest
from atom_lens.activations.models import DTYPES, find_model, load_tokenizer
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.activations.stream import Stream
from atom_lens.errors import AtomLensError
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.sections import Split, Streaming
from atom_lens.tensors.rows import Rows, float32_rows

Side = Literal["train", "validation", "heldout"]


def document_side(split: Split, document: str) -> Side:
    """The side of a document, drawn from its text: the same for every copy, and however many documents there are."""
    digest = hashlib.sha256(f"{split.seed} {document}".encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    if at < split.heldout:
        return "heldout"
    return "validation" if at < split.heldout + split.validation * (1 - split.heldout) else "train"


def first_contexts(
    documents: Iterable[Prompt], tokenizer: Any, asked: Streaming, split: Split, prepend_bos: bool
) -> list[Prompt]:
    """Contexts of the first documents: as many tokens of each side of a split as are asked for, or all there are.

    Raises:
        AtomLensError: a side of the split has no documents.
    """
    missing: dict[Side, int] = {"train": asked.metric_tokens, "heldout": asked.heldout_tokens}
    if split.validation:
        missing["validation"] = asked.heldout_tokens
    found: list[Prompt] = []
    empty = set(missing)
    for context, tokens in contexts(documents, tokenizer, asked.context_size, prepend_bos):
        side = document_side(split, context.group)
        if missing[side] > 0:
            found.append(context)
            missing[side] -= tokens
            empty.discard(side)
            if max(missing.values()) <= 0:
                break
    if empty:
        raise AtomLensError(
            f"split.heldout is {split.heldout} and split.validation {split.validation}: no document is on the side "
            f"{' or '.join(sorted(empty))}, give more documents"
        )
    return found


def beginnings(recipe: Recipe) -> list[Prompt]:
    """The `first_contexts` of the documents of a recipe with a section `stream`."""
    assert recipe.stream is not None
    tokenizer = load_tokenizer(find_model(recipe.model.name, recipe.model.revision))
    return first_contexts(
        recipe.source("stream").documents(), tokenizer, recipe.stream, recipe.split, recipe.prepend_bos
    )


def model_of(recipe: Recipe) -> Callable[[], Backend]:
    """Loads the model of a recipe when it is first called, and returns it from then on."""
    source = find_model(recipe.model.name, recipe.model.revision)
    return cache(lambda: open_backend(source, recipe.model.backend, DTYPES[recipe.model.dtype], recipe.model.device))


def stream_of(recipe: Recipe, prompts: Sequence[Prompt], found: Harvest, opened: Callable[[], Backend]) -> Stream:
    """The activations of all training documents, without any token prefix that is also held out.

    Those that are already known come from the store, in every pass.

    Args:
        recipe: with a section `stream`.
        prompts: its `beginnings`.
        found: their activations.
        opened: its `model_of`.
    """
    assert recipe.stream is not None
    tokenizer = load_tokenizer(find_model(recipe.model.name, recipe.model.revision))
    sides = [document_side(recipe.split, prompt.group) for prompt in prompts]
    aside = [prompt for prompt, side in zip(prompts, sides, strict=True) if side != "train"]

    def documents() -> Iterator[Prompt]:
        return (one for one in recipe.source("stream").documents() if document_side(recipe.split, one.group) == "train")

    return Stream(
        opened,
        documents,
        tokenizer,
        found.limits,
        recipe.stream.context_size,
        recipe.prepend_bos,
        all_prefixes(aside, tokenizer, recipe.prepend_bos),
        _known(found, torch.tensor([side == "train" for side in sides])),
        sides.count("train"),
    )


def _known(found: Harvest, training: Bool[Tensor, " p"]) -> dict[str, Rows]:
    """The rows of training prompts that no hook leaves out."""
    n = len(next(iter(found.views.values())).matrix)
    times = torch.zeros(n, dtype=torch.long)
    for hook, view in found.views.items():
        index = torch.arange(n) if view.index is None else view.index
        times[index[training[found.rows[hook][:, 0]]]] += 1
    chosen = (times == len(found)).nonzero()[:, 0]
    return {hook: float32_rows(Rows(view.matrix, chosen)) for hook, view in found.views.items()}
