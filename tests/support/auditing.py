"""A TopK SAE of sae-lens, and text to audit it on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LETTERS
from sae_lens import SAE, TopKSAE, TopKSAEConfig

HOOK = "blocks.1.hook_resid_post"


def topk(k: int = 3, d_in: int = 16, seed: int = 0, **metadata: Any) -> SAE[Any]:
    """A TopK SAE of sae-lens with random weights."""
    sae = TopKSAE(TopKSAEConfig(k=k, d_in=d_in, d_sae=40))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """400 documents of random letters, a line each."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(LETTERS[64:90], k=draw.randint(2, 30))) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return tmp_path / "text.txt"


@pytest.fixture
def stock(tiny: str, tmp_path: Path) -> Path:
    """The folder of a TopK SAE that names the tiny model and a hook of it."""
    topk(model_name=tiny, hook_name=HOOK, context_size=16, prepend_bos=True).save_model(tmp_path / "topk")
    return tmp_path / "topk"
