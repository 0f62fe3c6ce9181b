"""The figures of one dictionary on one split of the data, all from a single pass over its codes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.evidence.faithfulness import Residuals
from atom_lens.evidence.stability import stability
from atom_lens.geometry import AtomicInnerProduct, check_rows


@runtime_checkable
class Dictionary(Protocol):
    """What evidence needs of a dictionary: any sae-lens SAE has it."""

    @property
    def W_dec(self) -> Tensor: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


@torch.no_grad()
def measure(
    dictionary: Dictionary, x: Float[Tensor, "n d"], metric: AtomicInnerProduct, batch: int = 1024
) -> dict[str, Any]:
    """R² (Euclidean and AIP), q*, L0, empty codes, dead atoms and coherence of `dictionary` on `x`.

    Args:
        dictionary: rows `W_dec` of shape (F, d), `encode` to codes (n, F), `decode` back to (n, d).
        x: activations of one split, shape (n, d).
        metric: the AIP the figures are taken under.
        batch: rows encoded at a time.

    Returns:
        The fields of a split in report.json: r2, r2_aip, q_star, l0, empty_codes, dead_atoms, coherence.
    """
    check_rows(x, "x", metric.width)
    check_rows(dictionary.W_dec.detach(), "the dictionary", metric.width)
    device = dictionary.W_dec.device
    metric = metric.to(device)
    plain, whitened = Residuals(metric.width), Residuals(metric.width, metric)
    counts, alive = [], torch.zeros(len(dictionary.W_dec), dtype=torch.bool, device=device)
    for rows in (chunk.to(device) for chunk in x.split(batch)):
        codes = dictionary.encode(rows)
        reconstruction = dictionary.decode(codes)
        check_rows(reconstruction, "the reconstruction", metric.width)
        plain.update(rows, reconstruction)
        whitened.update(rows, reconstruction)
        counts.append((codes != 0).sum(dim=1))
        alive |= (codes != 0).any(dim=0)
    l0 = torch.cat(counts)
    found = stability(dictionary.W_dec.detach().float(), l0, metric, alive)
    return {
        "n": len(x),
        "r2": plain.r2,
        "r2_aip": whitened.r2,
        "q_star": found.q_star,
        "l0": {
            "mean": float(l0.double().mean()),
            "p50": found.l0_quantile(0.5),
            "p998": found.l0_quantile(0.998),
            "max": int(l0.max()),
        },
        "empty_codes": found.empty_codes,
        "dead_atoms": found.dead_atoms,
        "coherence": {
            "p50": found.coherence_quantile(0.5),
            "p998": found.coherence_quantile(0.998),
            "max": found.max_coherence,
        },
    }
