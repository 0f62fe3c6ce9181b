"""Which tokens to read: found by the character offsets of the tokenizer, never by tokenising the subject alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from atom_lens._files import shown
from atom_lens.activations.prompts import Prompt

Positions = Literal["subject_last", "last", "all", "span"]


def select_tokens(prompt: Prompt, offsets: Sequence[tuple[int, int]], positions: Positions) -> list[int]:
    """Indices of the tokens to read.

    Args:
        prompt: the prompt that was tokenised.
        offsets: character range of every token; special tokens (BOS) have an empty one.
        positions: "subject_last" the last token that covers a character of the subject, "span" all that do,
            "last" the last token of the prompt, "all" every token that stands for text (special ones do not).

    Raises:
        ValueError: unknown `positions`, a prompt without a subject, or a subject beyond the tokens.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}, allowed are {', '.join(get_args(Positions))}")
    text_tokens = [i for i, (start, end) in enumerate(offsets) if end > start]
    if not text_tokens:
        raise ValueError(f"the prompt {shown(prompt.text)!r} has no tokens")
    if positions == "all":
        return text_tokens
    if positions == "last":
        return text_tokens[-1:]
    if prompt.span is None:
        raise ValueError(f"positions {positions!r} need a subject, the prompt {shown(prompt.text)!r} has none")
    start, end = prompt.span
    inside = [i for i in text_tokens if offsets[i][0] < end and offsets[i][1] > start]
    if not inside or offsets[inside[-1]][1] < end:
        raise ValueError(
            f"the subject of {shown(prompt.text)!r} lies beyond its {len(offsets)} tokens: raise max_tokens"
        )
    return inside[-1:] if positions == "subject_last" else inside


class Read(NamedTuple):
    """One prompt as token ids, cut after the last token that is read, and the tokens to read."""

    prompt: int
    ids: list[int]
    tokens: list[int]


def tokens_to_read(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    positions: Positions,
    *,
    max_tokens: int,
    prepend_bos: bool = True,
    unique: bool = False,
) -> list[Read]:
    """Tokenise `prompts` and find what to read of each; with `unique`, each token prefix once over all prompts.

    Raises:
        ValueError: a tokenizer without character offsets, or what `select_tokens` refuses.
    """
    reads = []
    seen: set[int] = set()
    for index, (ids, offsets) in enumerate(tokenised(tokenizer, prompts, max_tokens, prepend_bos)):
        tokens = select_tokens(prompts[index], offsets, positions)
        if unique:
            tokens = _not_seen(ids, tokens, seen)
        if tokens:
            # The models are causal: what follows the last token read cannot change it.
            reads.append(Read(index, ids[: tokens[-1] + 1], tokens))
    return reads


def tokenised(
    tokenizer: Any, prompts: Sequence[Prompt], max_tokens: int, prepend_bos: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each prompt, and the characters that each token stands for: none for BOS.

    Raises:
        ValueError: a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"the tokenizer {type(tokenizer).__name__} gives no character offsets, a fast one is needed")
    # Tokenizers and backends differ in whether they add BOS by themselves, so it is added here and nowhere else.
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    encoded = tokenizer(
        [prompt.text for prompt in prompts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=True,
        max_length=max(1, max_tokens - len(bos)),
    )
    for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield bos + ids, [(0, 0)] * len(bos) + offsets


def _not_seen(ids: list[int], tokens: list[int], seen: set[int]) -> list[int]:
    """Those of `tokens` whose prefix of `ids` is not in `seen`, which they are added to."""
    new, prefix, wanted = [], 0, set(tokens)
    for token in range(tokens[-1] + 1):
        prefix = hash((prefix, ids[token]))
        if token in wanted and prefix not in seen:
            seen.add(prefix)
            new.append(token)
    return new
