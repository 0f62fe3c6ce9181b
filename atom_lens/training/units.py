"""Units that are trained: our TSAEs, and stock sae-lens SAEs as its users train them."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from torch import Tensor

from atom_lens.activations.models import pick_device
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.rows import Rows
from atom_lens.training.fit import Learner, finish, tsae_learner
from atom_lens.training.recipe import Atoms
from atom_lens.tsae_training import TSAETraining


def unit_learner(
    unit: str,
    sparsity: float,
    x: Float[Tensor | Rows, "n d"],
    aip: AtomicInnerProduct,
    atoms: Atoms,
    device: str = "cpu",
    seed: int = 0,
) -> Learner:
    """A unit of `training.recipe.Unit` at its start: tsae_tied, tsae_free, or a stock architecture, maybe _whitened.

    Args:
        unit: its name.
        sparsity: target L0, K, or the weight of the L1 of ReLU and gated SAEs.
        x: training activations, shape (n, d), from which TSAEs start.
        aip: the metric TSAEs train in.
        atoms: capacity of all units, and what else TSAEs need.
        device: where it trains.
        seed: of its start.
    """
    kind, _, variant = unit.partition("_")
    if kind == "tsae":
        return tsae_learner(
            x, aip, atoms.model_copy(update={"encoder": variant, "target_l0": sparsity}), device, seed=seed
        )
    return Learner(stock_sae(kind, sparsity, aip.width, atoms.capacity, bool(variant), pick_device(device), seed))


def trained_unit(learner: Learner, aip: AtomicInnerProduct) -> SAE[Any]:
    """What a unit has become, on raw activations; a stock SAE goes through the files that sae-lens writes."""
    if isinstance(learner.sae, TSAETraining):
        return finish(learner, aip)
    with tempfile.TemporaryDirectory() as folder:
        learner.sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=str(learner.sae.device))


def stock_sae(
    architecture: str, sparsity: float, d_in: int, d_sae: int, whitened: bool, device: str, seed: int
) -> TrainingSAE[Any]:
    """A stock training SAE of sae-lens, with its defaults.

    Args:
        architecture: relu, gated, topk, batchtopk or jumprelu.
        sparsity: K of TopK and BatchTopK, the target L0 of JumpReLU (its quadratic loss), the weight of the L1 of ReLU
            and gated SAEs.
        d_in: width of the activations.
        d_sae: number of latents.
        whitened: with sae-lens' own `covariance_whitening`, or on raw activations.
        device: where it trains.
        seed: of its initial weights.
    """
    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "device": device,
        "normalize_activations": "covariance_whitening" if whitened else "expected_average_only_in",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "relu":
            return StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=sparsity, **shared))
        if architecture == "gated":
            return GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=sparsity, **shared))
        if architecture == "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(k=round(sparsity), **shared))
        if architecture == "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=sparsity, **shared))
        target = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": sparsity}
        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**target, **shared))
