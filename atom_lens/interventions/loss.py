"""Loss: how much worse a model predicts text when a dictionary's reconstructions replace its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from atom_lens.activations.backends.protocol import Backend, Change
from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.positions import tokenised
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.errors import AtomLensError
from atom_lens.evidence.results import Loss
from atom_lens.interventions.facts import padded
from atom_lens.interventions.splice import heads_merged

_TOKENS = 256  # per batch: its logits are tokens x vocabulary
_ROWS = 8  # rows of logits copied at a time: copying all would cost more in page faults than in arithmetic


@torch.no_grad()
def spliced_losses(
    model: Any,
    prompts: Sequence[Prompt],
    hook: str,
    dictionaries: Mapping[str, Dictionary],
    prepend_bos: bool = True,
    max_tokens: int = 1024,
) -> dict[str, Loss]:
    """Cross-entropy and KL of the model on texts, with each dictionary spliced in, all on the same batches.

    This is how sae-lens' evaluator computes `ce_loss_score` when it leaves special tokens out of the reconstruction:
    the first token keeps its activation where a beginning-of-sequence token was prepended (no dictionary is made for
    it), and the ablation puts zeros everywhere.

    Args:
        model: a TransformerBridge, a HookedTransformer or an nnsight model.
        prompts: texts.
        hook: where the dictionaries act.
        dictionaries: by name.
        prepend_bos: put a beginning-of-sequence token before every text.
        max_tokens: longer texts are cut after these, and where the model's context ends.

    Raises:
        AtomLensError: no text has two tokens, no such hook, or a dictionary of another width.
    """
    backend = wrap_backend(model)
    if hook not in backend.hooks:
        raise AtomLensError(f"hook {hook!r} is not in this model, it has names such as {', '.join(backend.hooks[:3])}")
    most = min(max_tokens, backend.n_ctx)
    texts = [prompt.text for prompt in prompts]
    tokens = [ids[:most] for ids, _ in tokenised(backend.tokenizer, texts, prepend_bos)]
    tokens = sorted((ids for ids in tokens if len(ids) > 1), key=len)
    if not tokens:
        raise AtomLensError(f"none of the {len(prompts)} texts has two tokens, the loss needs at least one that has")
    first = prepend_bos and tokens[0][0] == backend.tokenizer.bos_token_id
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("clean", "ablated", *dictionaries)}
    predicted = read = 0
    with tqdm(total=len(tokens), desc="Loss", unit="text") as bar:
        for some in _batches(tokens):
            batch = padded([(row, ids, []) for row, ids in enumerate(some)], backend.device)
            real = batch.mask.bool()
            kept = real & (batch.mask.cumsum(dim=1) > int(first))
            clean = _logprobs(backend, batch.tokens, batch.mask)
            changes: dict[str, Change | None] = {"clean": None, "ablated": _zeros}
            changes |= {name: _replacing(one, kept, hook) for name, one in dictionaries.items()}
            for name, change in changes.items():
                found = clean if change is None else _changed(backend, batch.tokens, batch.mask, hook, change)
                sums[name] += torch.stack([_cross_entropy(found, batch.tokens, real), _kl(clean, found, real)]).cpu()
            predicted, read = predicted + int(real[:, :-1].sum()), read + int(real.sum())
            bar.update(len(some))
    entropy = {name: float(total[0] / predicted) for name, total in sums.items()}
    lost = entropy["ablated"] - entropy["clean"]
    return {
        name: Loss(
            n=predicted,
            clean=entropy["clean"],
            ablated=entropy["ablated"],
            spliced=entropy[name],
            recovered=(entropy["ablated"] - entropy[name]) / lost,
            kl=float(sums[name][1] / read),
        )
        for name in dictionaries
    }


def first_texts(texts: Sequence[Prompt], tokenizer: Any, n: int) -> list[Prompt]:
    """The first of `texts` that have `n` tokens together, or all."""
    chosen, had = [], 0
    for text in texts:
        if had >= n:
            break
        chosen.append(text)
        had += len(tokenizer(text.text, add_special_tokens=False)["input_ids"])
    return chosen


def _batches(tokens: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Texts of about the same length, up to `_TOKENS` tokens together."""
    batch: list[list[int]] = []
    for ids in tokens:
        if batch and (len(batch) + 1) * len(ids) > _TOKENS:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _zeros(x: Tensor, past: int) -> Tensor:
    return torch.zeros_like(x)


def _replacing(dictionary: Dictionary, kept: Bool[Tensor, "batch pos"], hook: str) -> Change:
    """Replace the activations of the tokens in `kept` by reconstructions."""

    def change(x: Tensor, past: int) -> Tensor:
        rows = x.flatten(2)
        width = dictionary.W_dec.shape[1]
        if rows.shape[2] != width:
            raise AtomLensError(f"hook {hook!r} has activations of width {rows.shape[2]}, the dictionary has {width}")
        new = rows.clone()
        with heads_merged(dictionary) if isinstance(dictionary, SAE) else nullcontext():
            codes = dictionary.encode(rows[kept].to(dictionary.W_dec))
            new[kept] = dictionary.decode(codes).to(new)
        return new.reshape(x.shape)

    return change


def _changed(
    backend: Backend, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], hook: str, change: Change
) -> Float[Tensor, "batch pos vocab"]:
    detach: Callable[[], None] = backend.attach(hook, change)
    try:
        return _logprobs(backend, tokens, mask)
    finally:
        detach()


def _logprobs(
    backend: Backend, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    logits = backend.logits(tokens, mask, tokens.shape[1]).float().contiguous()
    for part in logits.flatten(0, 1).split(_ROWS):
        part.copy_(part.log_softmax(dim=-1))
    return logits


def _cross_entropy(
    logprobs: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    # Padding is on the left: what follows a real token is real.
    each = -logprobs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    return each[real[:, :-1]].double().sum()


def _kl(
    clean: Float[Tensor, "batch pos vocab"], found: Float[Tensor, "batch pos vocab"], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    if found is clean:
        return torch.zeros((), dtype=torch.float64, device=clean.device)
    pairs = zip(clean.flatten(0, 1).split(_ROWS), found.flatten(0, 1).split(_ROWS), strict=True)
    each = torch.cat([((one - other) * one.exp()).sum(dim=-1) for one, other in pairs])
    return each[real.flatten()].double().sum()
