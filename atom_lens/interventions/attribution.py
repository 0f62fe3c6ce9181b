"""Which atoms an answer depends on: activation times gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.positions import Positions
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.interventions.facts import BATCH, answer_logprob, answered, padded


class Read(NamedTuple):
    """The activation at the chosen token of every prompt, and how the log-odds of the answer depend on it.

    Attributes:
        x: activations.
        gradient: of the log-odds of the answer, ln p / (1 - p), with respect to the activation; nats per unit of it.
    """

    x: Float[Tensor, "n d"]
    gradient: Float[Tensor, "n d"]


@torch.enable_grad()
def read(
    model: Any,
    hook: str,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    positions: Positions = "subject_last",
    prepend_bos: bool = True,
) -> Read:
    """Activations at `hook` and gradients of the answers, one forward and one backward pass per batch.

    Raises:
        AtomLensError: a prompt with more than one chosen token.
    """
    backend = wrap_backend(model)
    ordered = answered(backend, prompts, [[answer] for answer in answers], positions, prepend_bos)
    xs: list[Tensor] = [torch.empty(0)] * len(prompts)
    gradients = list(xs)
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        batch = padded([(s.row, s.ids, s.chosen) for s in part], backend.device)
        if not bool((batch.subject.sum(dim=1) == 1).all()):
            raise AtomLensError(f"positions {positions!r} chooses several tokens of a prompt, attribution reads one")
        kept: list[Tensor] = []

        def keep(x: Tensor, past: int, kept: list[Tensor] = kept) -> Tensor:
            # Two copies: some models later change an activation in place, either the one passed on or another one.
            kept.append(x.detach().clone().requires_grad_())
            return kept[0].clone()

        detach = backend.attach(hook, keep)
        try:
            logits = backend.logits(batch.tokens, batch.mask, max(len(s.answers[0][1]) for s in part))
        finally:
            detach()
        logprobs = logits.float().log_softmax(dim=-1)
        logp = torch.stack(
            [answer_logprob(logprobs[i, -len(s.answers[0][1]) :], s.answers[0][1]) for i, s in enumerate(part)]
        )
        log_odds = logp - torch.log1p(-logp.exp().clamp(max=1 - 1e-6))
        (gradient,) = torch.autograd.grad(log_odds.sum(), kept)
        for i, sequence in enumerate(part):
            where = batch.subject[i].nonzero()[0, 0]
            xs[sequence.row] = kept[0][i, where].detach().flatten().float().cpu()  # heads side by side
            gradients[sequence.row] = gradient[i, where].flatten().float().cpu()
    return Read(torch.stack(xs), torch.stack(gradients))


def attribution(sae: SAE[Any], found: Read) -> Float[Tensor, "n F"]:
    """How much ablating each atom lowers the log-odds of the answer, to first order: z_j <gradient, d_j>, in nats."""
    with torch.enable_grad():
        codes = sae.encode(found.x.to(sae.W_dec)).detach().requires_grad_()
        # Through decode() itself: some SAEs of sae-lens scale what they decode.
        (slope,) = torch.autograd.grad((sae.decode(codes) * found.gradient.to(sae.W_dec)).sum(), codes)
    return (codes * slope).detach()
