"""The architectures that atom-lens registers with sae-lens."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.registry import get_sae_training_class

D = 32  # width of activations
F = 128  # atoms
K = 4  # of them in a code

PLAIN = {"aip_tsae": "JumpReLUSAE", "aip_topk": "TopKSAE", "aip_pursuit": "PursuitSAE"}
ARCHITECTURES = tuple(PLAIN)


def config_of(architecture: str, l0: int, **options: Any) -> Any:
    """A training configuration that asks for that L0."""
    asked = {
        "aip_tsae": {"target_l0": float(l0)},
        "aip_topk": {"k": l0},
        "aip_pursuit": {"k": float(l0), "max_iterations": 2 * l0},
    }
    return get_sae_training_class(architecture)[1](**{**asked[architecture], **options})


def sae(architecture: str = "aip_tsae", k: int = K, **options: Any) -> Any:
    config = config_of(architecture, k, **{"d_in": D, "d_sae": F, **options})
    return get_sae_training_class(architecture)[0](config)


def planted(n: int, d: int = D, f: int = F, k: int = K) -> torch.Tensor:
    """k of f random directions with coefficients of 0.5 to 1.5, noise, and a mean beside which they are small."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
    index = torch.rand(n, f, generator=generator).topk(k).indices
    codes = 0.5 + torch.rand(n, k, generator=generator)
    x = torch.nn.functional.embedding_bag(index, atoms, per_sample_weights=codes, mode="sum")
    return x + 0.02 * torch.randn(n, d, generator=generator) + 3 * torch.randn(d, generator=generator)
