"""Train and held-out rows, with no subject on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def heldout_rows(groups: Sequence[str], share: float, seed: int) -> Bool[Tensor, " n"]:
    """True for held-out rows: `share` of the distinct groups, drawn with `seed`, and at least one.

    Args:
        groups: the subject (or text) of every row.
        share: of the groups, above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: fewer than two groups.
    """
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < 2:
        raise ValueError(f"a split by subject needs at least 2 subjects, got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    n_heldout = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = {distinct[i] for i in order[:n_heldout]}
    return torch.tensor([group in chosen for group in groups])
