"""Documents: running text of any length, cut into contexts that a model reads one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from atom_lens.activations.positions import prefixes, tokenised
from atom_lens.activations.prompts.prompt import Prompt

_AT_ONCE = 64  # documents that are tokenised together


def contexts(documents: Iterable[Prompt], tokenizer: Any, size: int, prepend_bos: bool) -> Iterator[tuple[Prompt, int]]:
    """Contexts of up to `size` tokens, the beginning-of-sequence token included, and how many other tokens each has.

    A context lies within one document and has its `group`, so no activation depends on a document from another side of
    a split. Documents are cut between tokens; the pieces are tokenised again when they are read.
    """
    documents = iter(documents)
    room = size - bool(prepend_bos and tokenizer.bos_token_id is not None)
    while some := list(islice(documents, _AT_ONCE)):
        found = tokenised(tokenizer, [document.text for document in some], prepend_bos)
        for document, (_, offsets) in zip(some, found, strict=True):
            spans = [(start, end) for start, end in offsets if end > start]
            for at in range(0, len(spans), room):
                piece = spans[at : at + room]
                text = document.text[piece[0][0] : piece[-1][1]]
                yield replace(Prompt(text), document=document.group), len(piece)


def all_prefixes(texts: Iterable[Prompt], tokenizer: Any, prepend_bos: bool) -> set[int]:
    """All prefixes of `texts`, for `tokens_to_read`."""
    read = tokenised(tokenizer, [text.text for text in texts], prepend_bos)
    return {prefix for ids, _ in read for prefix in prefixes(ids)}
