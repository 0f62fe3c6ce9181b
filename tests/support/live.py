"""The tiny model under every backend, with one way to run it, and an SAE for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import find_model, load_model

HOOK = "blocks.1.hook_resid_post"
LATER = "blocks.2.hook_resid_post"
TOKENS = torch.tensor([[1, 20, 31, 42, 53, 14, 25], [1, 9, 8, 47, 6, 35, 4]])
# Left padding of the second row by two.
PADDED = torch.tensor([[1, 20, 31, 42, 53, 14, 25], [2, 2, 1, 47, 6, 35, 4]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])


def make_sae(hook: str = HOOK, d_in: int = 16, seed: int = 0, **cfg: Any) -> SAE[Any]:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=40, metadata=SAEMetadata(hook_name=hook), **cfg))
    generator = torch.Generator().manual_seed(seed)
    sae.W_enc.data.normal_(std=20, generator=generator)  # residuals of the tiny model are of the order 0.01
    for weight in (sae.W_dec, sae.b_dec):
        weight.data.normal_(std=0.02, generator=generator)
    sae.b_enc.data.normal_(generator=generator)
    sae.threshold.data.fill_(0.1)
    return sae


class Model:
    """A model under a backend, and its logits."""

    def __init__(self, model: Any, logits: Callable[..., torch.Tensor], generate: Callable[..., torch.Tensor]) -> None:
        self.model, self.logits, self.generate = model, logits, generate


def open_model(kind: str, tiny: str) -> Model:
    source = find_model(tiny)
    if kind == "hooked":
        torch.manual_seed(0)
        # Rotary: with learned positions TransformerLens 3.9 generates other tokens with its cache than without.
        config = HookedTransformerConfig(
            n_layers=3,
            d_model=16,
            n_ctx=64,
            d_head=8,
            d_vocab=60,
            act_fn="gelu",
            init_weights=True,
            positional_embedding_type="rotary",
            rotary_dim=8,
            device="cpu",
        )
        hooked = HookedTransformer(config).eval()
        return Model(
            hooked,
            lambda tokens, mask=None: hooked(tokens, attention_mask=mask, padding_side="left"),
            lambda tokens, n: hooked.generate(tokens, n, do_sample=False, stop_at_eos=False, verbose=False),
        )
    if kind == "nnsight":
        traced = open_backend(source, "nnsight", torch.float32, "cpu").model

        def logits(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            mask = torch.ones_like(tokens) if mask is None else mask
            with traced.trace({"input_ids": tokens, "attention_mask": mask}):
                found = traced.output.logits.save()
            return found

        def generate(tokens: torch.Tensor, n: int) -> torch.Tensor:
            with traced.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False) as tracer:
                found = tracer.result.save()
            return found

        return Model(traced, logits, generate)
    if kind == "sae_bridge":
        model, tokenizer = load_model(source, torch.float32, "cpu")
        bridge: Any = SAETransformerBridge.boot_transformers(tiny, hf_model=model, tokenizer=tokenizer, device="cpu")
    else:
        bridge = open_backend(source, "transformer_lens", torch.float32, "cpu").model
    return Model(
        bridge,
        lambda tokens, mask=None: bridge(tokens, attention_mask=mask),
        lambda tokens, n: bridge.generate(tokens, n, do_sample=False, stop_at_eos=False, verbose=False),
    )


@pytest.fixture(params=["bridge", "sae_bridge", "hooked", "nnsight"])
def live(request: pytest.FixtureRequest, tiny: str) -> Model:
    return open_model(request.param, tiny)
