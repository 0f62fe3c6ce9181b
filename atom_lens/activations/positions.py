"""Which tokens to read: found by the tokenizer's character offsets, never by tokenising the subject alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, Literal, NamedTuple, get_args

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import shown

Positions = Literal["subject_last", "last", "all", "span"]


def select_tokens(
    prompt: Prompt, offsets: Sequence[tuple[int, int]], positions: Positions, max_tokens: int | None = None
) -> list[int]:
    """Indices of the tokens to read.

    Args:
        prompt: the prompt that was tokenised.
        offsets: character range of every token of the whole prompt; special tokens (BOS) have an empty one.
        positions: "subject_last" the last token that covers a character of the subject, "span" all that do,
            "last" the last token of the prompt, "all" every token that covers text (special tokens do not).
        max_tokens: only the first so many can be read; "all" are then fewer.

    Raises:
        AtomLensError: unknown `positions`, a prompt without a subject, a subject that no token covers, or tokens to
            read beyond `max_tokens`.
    """
    check_prompts([prompt], positions)
    text_tokens = [i for i, (start, end) in enumerate(offsets) if end > start]
    if not text_tokens:
        raise AtomLensError(f"the prompt {shown(prompt.text)!r} has no tokens")
    limit = len(offsets) if max_tokens is None else max_tokens
    if positions == "all":
        chosen = [i for i in text_tokens if i < limit] or text_tokens
    elif positions == "last":
        chosen = text_tokens[-1:]
    else:
        assert prompt.span is not None
        start, end = prompt.span
        # Normalising tokenizers leave characters without a token, perhaps the last ones of a subject.
        chosen = [i for i in text_tokens if offsets[i][0] < end and offsets[i][1] > start]
        if not chosen:
            raise AtomLensError(f"no token covers the subject of {shown(prompt.text)!r}")
        if positions == "subject_last":
            chosen = chosen[-1:]
    if chosen[-1] >= limit:
        what = "last token" if positions == "last" else "text" if positions == "all" else "subject"
        raise AtomLensError(
            f"the {what} of {shown(prompt.text)!r} lies beyond its first {limit} tokens: raise max_tokens, if the "
            "model reads more"
        )
    return chosen


def check_prompts(prompts: Sequence[Prompt], positions: Positions) -> None:
    """Check that `positions` can be found in `prompts`, before any model is loaded.

    Raises:
        AtomLensError: unknown `positions`, or a prompt without a subject where one is needed.
    """
    if positions not in get_args(Positions):
        raise AtomLensError(f"positions is {positions!r}, allowed are {', '.join(get_args(Positions))}")
    for prompt in prompts if positions in ("subject_last", "span") else ():
        if prompt.span is None:
            raise AtomLensError(f"positions {positions!r} needs a subject, the prompt {shown(prompt.text)!r} has none")


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
    without: Set[int] = frozenset(),
) -> list[Read]:
    """Tokenise `prompts` and find the tokens to read of each.

    With `unique`, each token prefix is read once over all prompts; the prefixes in `without` are not read at all.

    Raises:
        AtomLensError: a tokenizer without character offsets, or what `select_tokens` refuses.
    """
    reads = []
    seen: set[int] = set()
    texts = [prompt.text for prompt in prompts]
    for index, (ids, offsets) in enumerate(tokenised(tokenizer, texts, prepend_bos)):
        tokens = select_tokens(prompts[index], offsets, positions, max_tokens)
        if without:
            known = list(prefixes(ids[: tokens[-1] + 1]))
            tokens = [token for token in tokens if known[token] not in without]
        if unique and tokens:
            tokens = _not_seen(ids, tokens, seen)
        if tokens:
            # The models are causal: what follows the last token read cannot change it.
            reads.append(Read(index, ids[: tokens[-1] + 1], tokens))
    return reads


def tokenised(
    tokenizer: Any, texts: Sequence[str], prepend_bos: bool
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of each text, however long, and the character range that each token covers: none for BOS.

    Raises:
        AtomLensError: a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise AtomLensError(f"the tokenizer {type(tokenizer).__name__} has no character offsets, a fast one is needed")
    # Tokenizers and backends differ in whether they add BOS, so it is added here and nowhere else.
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    # Not truncated here: some tokenizers would cut the start. Callers check lengths, so it need not warn of them.
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield bos + ids, [(0, 0)] * len(bos) + _with_blanks(text, offsets)


def _with_blanks(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which a token of blanks covers its blanks: byte-level tokenizers (Llama 3's) trim them to nothing."""
    found, reached = [], 0
    for start, end in offsets:
        if start == end:
            # A blank that the tokenizer put before the text covers nothing.
            start, end = reached, max(end, reached + text.startswith(" ", reached))
        found.append((start, end))
        reached = max(reached, end)
    return found


def prefixes(ids: Iterable[int]) -> Iterator[int]:
    """For every token a hash of its prefix, the token included."""
    prefix = 0
    for token in ids:
        prefix = hash((prefix, token))
        yield prefix


def _not_seen(ids: list[int], tokens: list[int], seen: set[int]) -> list[int]:
    """The `tokens` whose prefix of `ids` is not in `seen`; their prefixes are added to it."""
    new, wanted = [], set(tokens)
    for token, prefix in enumerate(prefixes(ids[: tokens[-1] + 1])):
        if token in wanted and prefix not in seen:
            seen.add(prefix)
            new.append(token)
    return new
