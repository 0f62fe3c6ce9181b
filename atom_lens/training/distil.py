"""Distil: a plain TopK SAE over the atoms of a pursuit, for tools that need an encoder matrix."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.aip_topk import AIPTopK
from atom_lens.dictionaries.pursuit.distilled import distilling
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.dictionaries.registry import finish
from atom_lens.geometry import check_rows
from atom_lens.recipe.sections import Training
from atom_lens.tensors.rows import Rows
from atom_lens.training.fit import fit_together

_COUNTED = 8192


def distil(atoms: PursuitSAE, x: Float[Tensor | Rows, "n d"], training: Training) -> AIPTopK:
    """A ``topk`` SAE with the atoms of `atoms`, whose K is the mean L0 of its codes of `x`.

    Args:
        atoms: a pursuit dictionary with its metric.
        x: raw activations, shape (n, d), that encoder and biases are trained on.
        training: steps, batch size, learning rate, device and seed.

    Returns:
        The SAE on raw activations. On disk it is a plain SAE, which SAEBench, dashboards and circuit tools can run.

    Raises:
        AtomLensError: activations that are not a finite matrix of the atoms' width.
    """
    x = check_rows(x, "x", atoms.cfg.d_in)
    counted = x[torch.arange(min(_COUNTED, len(x)))].to(atoms.W_dec)
    with torch.no_grad():
        k = max(1, round(float((atoms.encode(counted) != 0).sum(dim=1).double().mean())))
    learner = distilling(atoms, x, k, training.device, training.seed)
    fit_together({"x": x}, {"distilled": learner}, training)
    return cast("AIPTopK", finish(learner, atoms.aip))
