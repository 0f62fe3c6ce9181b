"""The logit lens: the words that an atom promotes and suppresses when it is written into the final residual stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atom_lens.storage.files import visible

WORDS = 8
_CELLS = 1 << 24  # logits held at a time
# Hooks of a block whose activations are in, or are added to, the residual stream that the unembedding reads.
_RESIDUAL = re.compile(r"blocks\.\d+\.hook_(resid_\w+|attn_out|mlp_out)")


@dataclass(frozen=True)
class Lens:
    """The unembedding behind the final norm.

    Attributes:
        weights: what a direction of the residual stream adds to the logits, up to a positive factor, shape (d, V).
        tokenizer: of the model.
    """

    weights: Float[Tensor, "d V"]
    tokenizer: Any

    def top(self, atoms: Float[Tensor, "F d"]) -> tuple[Int[Tensor, "F k"], Int[Tensor, "F k"]]:
        """The tokens that each atom promotes and suppresses most, strongest first."""
        promoted, suppressed = [], []
        for part in atoms.float().split(max(1, _CELLS // self.weights.shape[1])):
            logits = part @ self.weights
            promoted.append(logits.topk(WORDS, dim=1).indices)
            suppressed.append(logits.topk(WORDS, dim=1, largest=False).indices)
        return torch.cat(promoted), torch.cat(suppressed)


@torch.no_grad()
def lens_of(bridge: Any) -> Lens:
    """The lens of a live model, a TransformerBridge."""
    unembedding = bridge.W_U.detach().float()[:, : len(bridge.tokenizer)]
    # Any norm maps a vector of signs, of mean 0 and mean square 1, to gain * signs + bias, so that models which store
    # their gain less 1, or under another name, need no special cases.
    signs = torch.ones(len(unembedding), device=unembedding.device)
    signs[1::2] = -1
    both = bridge.ln_final(torch.stack([signs, -signs])[:, None].to(bridge.W_U.dtype)).float()[:, 0]
    weights = unembedding * ((both[0] - both[1]) / 2 * signs)[:, None]
    if not bridge.ln_final.uses_rms_norm:
        weights -= weights.mean(dim=0)  # a LayerNorm removes the mean of its input
    return Lens(weights.cpu(), bridge.tokenizer)


def is_residual(hook: str) -> bool:
    """Whether a hook's activations are written to the residual stream: elsewhere the unembedding means nothing."""
    return _RESIDUAL.fullmatch(hook) is not None


def columns(lens: Lens, atoms: Float[Tensor, "F d"]) -> dict[str, Any]:
    """For the browser: {"table": words, "up" and "down": 8 indices into it for every atom, in one list}."""
    up, down = lens.top(atoms)
    used, at = torch.cat([up, down]).unique(return_inverse=True)
    return {
        "table": [visible(word) for word in lens.tokenizer.batch_decode(used[:, None].tolist())],
        "up": at[: len(up)].flatten().tolist(),
        "down": at[len(up) :].flatten().tolist(),
    }
