"""Which tokens to read: found by the character offsets of the tokenizer, never by tokenising the subject alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

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
        raise ValueError(f"the prompt {prompt.text!r} has no tokens")
    if positions == "all":
        return text_tokens
    if positions == "last":
        return text_tokens[-1:]
    if prompt.span is None:
        raise ValueError(f"positions {positions!r} need a subject, the prompt {prompt.text!r} has none")
    start, end = prompt.span
    inside = [i for i in text_tokens if offsets[i][0] < end and offsets[i][1] > start]
    if not inside or offsets[inside[-1]][1] < end:
        raise ValueError(f"the subject of {prompt.text!r} lies beyond its {len(offsets)} tokens: raise max_tokens")
    return inside[-1:] if positions == "subject_last" else inside
