"""Train and held-out rows, with no subject on both sides."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from atom_lens.inputs import Labels, checked_seed, labels


def heldout_rows(groups: Labels, share: float, seed: int) -> Bool[Tensor, " n"]:
    """True for held-out rows: `share` of the distinct groups, drawn with `seed`, and at least one.

    Args:
        groups: the subject (or text) of every row.
        share: of the groups, above 0 and below 1.
        seed: of the draw.

    Raises:
        ValueError: fewer than two groups, a share or seed that is not allowed, or no labels.
    """
    names = labels(groups, None, "groups")
    if isinstance(share, bool) or not 0 < share < 1:
        raise ValueError(f"share is {share}, allowed is above 0 and below 1")
    distinct = list(dict.fromkeys(names))
    if len(distinct) < 2:
        raise ValueError(f"a split by subject needs at least 2 subjects, got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(checked_seed(seed))).tolist()
    n_heldout = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = {distinct[i] for i in order[:n_heldout]}
    return torch.tensor([group in chosen for group in names])
