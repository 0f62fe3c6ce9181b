"""Facts: prompts with a subject and a known answer, asked of a model, clean or under edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.positions import Positions, select_tokens
from atom_lens.activations.positions import tokenised as texts_tokenised
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.storage.files import shown

BATCH = 64


class Batch(NamedTuple):
    """Some prompts with the start of an answer, padded on the left.

    Attributes:
        rows: which prompts these are.
        tokens, mask: token ids, and which of them are real.
        subject: where the chosen tokens of the subject are, which edits act on.
    """

    rows: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    subject: Bool[Tensor, "batch pos"]


# Returns a context in which the model is edited while a batch runs; None leaves the model alone.
Prepare = Callable[[Batch], Any]


class Scores(NamedTuple):
    """How a model answers: log-probability of the whole answer, and whether greedy decoding gives it."""

    logprob: Float[Tensor, "n answers"]
    greedy: Bool[Tensor, "n answers"]


class Answered(NamedTuple):
    """A prompt with all tokens of an answer but the last, and the answers that can be scored on it."""

    row: int
    ids: list[int]
    chosen: list[int]
    answers: list[tuple[int, list[int]]]


def tokenised(
    tokenizer: Any, prompt: Prompt, answer: str, positions: Positions, prepend_bos: bool
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a prompt, of its answer after a blank (if there is one), and which tokens of the prompt to edit.

    Raises:
        AtomLensError: what `select_tokens` refuses, or an answer without tokens of its own.
    """
    text = f"{prompt.text} {answer}" if answer else prompt.text
    ((ids, offsets),) = texts_tokenised(tokenizer, [text], prepend_bos)
    n = sum(start < len(prompt.text) for start, _ in offsets)
    # A token that starts in the prompt and reaches into the answer would give a part of it away.
    if answer and (n == len(ids) or offsets[n - 1][1] > len(prompt.text) + 1):
        raise AtomLensError(f"the answer {shown(answer)!r} has no tokens of its own after {shown(prompt.text)!r}")
    return ids[:n], ids[n:], select_tokens(prompt, offsets[:n], positions)


def ask(
    model: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    edits: Mapping[str, Prepare | None],
    positions: Positions = "subject_last",
    prepend_bos: bool = True,
) -> dict[str, Scores]:
    """Score `answers` of every prompt, under every edit.

    Args:
        model: as of `splice`.
        prompts: n prompts.
        answers: for every prompt the answers to score, equally many.
        edits: name -> what to do before a batch runs; None for the clean model.
        positions: where `Batch.subject` points to.
        prepend_bos: put the tokenizer's BOS before every prompt.

    Returns:
        name -> `Scores` of shape (n, answers).
    """
    backend = wrap_backend(model)
    ordered = answered(backend, prompts, answers, positions, prepend_bos)
    shape = (len(prompts), max(map(len, answers)))
    found = {name: Scores(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)) for name in edits}
    with tqdm(total=len(ordered) * len(edits), desc="Answers", unit="prompt") as bar, torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            part = ordered[start : start + BATCH]
            batch = padded([(s.row, s.ids, s.chosen) for s in part], backend.device)
            keep = max(len(wanted) for s in part for _, wanted in s.answers)
            for name, prepare in edits.items():
                logprobs = _logits(backend, batch, keep, prepare).float().log_softmax(dim=-1)
                for i, sequence in enumerate(part):
                    for column, wanted in sequence.answers:
                        tail = logprobs[i, -len(wanted) :]
                        found[name].logprob[sequence.row, column] = answer_logprob(tail, wanted)
                        found[name].greedy[sequence.row, column] = tail.argmax(dim=1).tolist() == wanted
                bar.update(len(part))
    return found


def answered(
    backend: Backend,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    positions: Positions,
    prepend_bos: bool,
) -> list[Answered]:
    """Token sequences that score all `answers`; answers of one token share the sequence of their prompt.

    Raises:
        AtomLensError: what `tokenised` refuses, a blank answer, or a prompt and answer longer than the context.
    """
    sequences: dict[tuple[int, tuple[int, ...]], Answered] = {}
    for row, (prompt, options) in enumerate(zip(prompts, answers, strict=True)):
        for column, answer in enumerate(options):
            if not answer.strip():
                raise AtomLensError(f"answer {column} of {shown(prompt.text)!r} is {answer!r}, text is needed")
            ids, wanted, chosen = tokenised(backend.tokenizer, prompt, answer, positions, prepend_bos)
            if len(ids) + len(wanted) - 1 > backend.n_ctx:
                raise AtomLensError(
                    f"the prompt {shown(prompt.text)!r} has {len(ids) + len(wanted) - 1} tokens with its answer, the "
                    f"model reads {backend.n_ctx}"
                )
            key = (row, tuple(wanted[:-1]))
            sequences.setdefault(key, Answered(row, ids + wanted[:-1], chosen, [])).answers.append((column, wanted))
    # Answers of similar length together: fewer columns then go through the unembedding, the most expensive layer.
    return sorted(sequences.values(), key=lambda sequence: (len(sequence.answers[0][1]), len(sequence.ids)))


def answer_logprob(logprobs: Float[Tensor, "tokens vocab"], wanted: list[int]) -> Float[Tensor, ""]:
    """Log-probability of the whole answer from those of its tokens."""
    return logprobs.gather(1, torch.tensor(wanted, device=logprobs.device)[:, None]).sum()


def divergence(
    model: Any,
    prompts: Sequence[Prompt],
    edits: Mapping[str, Prepare],
    positions: Positions = "subject_last",
    prepend_bos: bool = True,
    max_tokens: int = 1024,
) -> dict[str, Float[Tensor, " n"]]:
    """KL(clean || edited) of the token that follows each prompt, in nats, under every edit.

    Args:
        model, prompts, edits, positions, prepend_bos: as of `ask`.
        max_tokens: longer prompts are cut after these, and where the model's context ends.

    Raises:
        AtomLensError: a prompt whose chosen tokens lie beyond `max_tokens`, so that edits there would do nothing.
    """
    backend = wrap_backend(model)
    max_tokens = min(max_tokens, backend.n_ctx)
    sequences = []
    for row, prompt in enumerate(prompts):
        ids, _, chosen = tokenised(backend.tokenizer, prompt, "", positions, prepend_bos)
        kept = [token for token in chosen if token < max_tokens]
        if not kept:
            raise AtomLensError(
                f"the chosen tokens of {shown(prompt.text)!r} lie beyond its first {max_tokens}: raise max_tokens"
            )
        sequences.append((row, ids[:max_tokens], kept))
    found = {name: torch.zeros(len(prompts)) for name in edits}
    ordered = sorted(sequences, key=lambda sequence: len(sequence[1]))
    with tqdm(total=len(ordered) * len(edits), desc="Divergence", unit="prompt") as bar, torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            batch = padded(ordered[start : start + BATCH], backend.device)
            clean = _logits(backend, batch, 1, None)[:, 0].float().log_softmax(dim=-1)
            for name, prepare in edits.items():
                edited = _logits(backend, batch, 1, prepare)[:, 0].float().log_softmax(dim=-1)
                kl = kl_div(edited, clean, reduction="none", log_target=True).sum(dim=1)
                found[name][batch.rows] = kl.clamp(min=0).cpu()
                bar.update(len(batch.rows))
    return found


def _logits(backend: Backend, batch: Batch, keep: int, prepare: Prepare | None) -> Float[Tensor, "batch keep vocab"]:
    if prepare is None:
        return backend.logits(batch.tokens, batch.mask, keep)
    with prepare(batch):
        return backend.logits(batch.tokens, batch.mask, keep)


def padded(sequences: Sequence[tuple[int, list[int], list[int]]], device: torch.device) -> Batch:
    """A batch of (row, token ids, tokens to edit)."""
    longest = max(len(ids) for _, ids, _ in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, subject = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for i, (_, ids, chosen) in enumerate(sequences):
        pad = longest - len(ids)
        tokens[i, pad:] = torch.tensor(ids)
        mask[i, pad:] = 1
        subject[i, [pad + token for token in chosen]] = True
    rows = torch.tensor([row for row, _, _ in sequences])
    return Batch(rows, tokens.to(device), mask.to(device), subject.to(device))
