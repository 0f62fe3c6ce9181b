"""Stock SAEs of sae-lens as its users train them, on raw activations and with its own whitening."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
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

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.registry import Learner, Setup, Sparsity, Trained, register
from atom_lens.geometry import AtomicInnerProduct


class _Stock(NamedTuple):
    """An architecture: its label, what `build` makes of the shared settings and a level, and the look of its family."""

    label: str
    build: Callable[[dict[str, Any], float], TrainingSAE[Any]]
    color: str
    sparsity: Sparsity = "l0"
    least: float = 0.0
    by_default: bool = True


_STOCK = {
    "relu": _Stock(
        "ReLU",
        lambda shared, l1: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=l1, **shared)),
        "#d9772b",
        sparsity="l1",
    ),
    "gated": _Stock(
        "gated",
        lambda shared, l1: GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=l1, **shared)),
        "#b5892a",
        sparsity="l1",
        by_default=False,
    ),
    "topk": _Stock(
        "TopK",
        lambda shared, k: TopKTrainingSAE(TopKTrainingSAEConfig(k=round(k), **shared)),
        "#3b82c4",
        least=1.0,
    ),
    "batchtopk": _Stock(
        "BatchTopK",
        lambda shared, k: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **shared)),
        "#1f9aa8",
        least=1.0,
    ),
    # Its quadratic loss is the one that has a target.
    "jumprelu": _Stock(
        "JumpReLU",
        lambda shared, l0: JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(jumprelu_sparsity_loss_mode="quadratic", target_l0=l0, **shared)
        ),
        "#9067c6",
    ),
}


def stock_sae(
    architecture: str, sparsity: float, d_in: int, d_sae: int, whitened: bool, device: str, seed: int
) -> TrainingSAE[Any]:
    """A stock training SAE of sae-lens, with its defaults.

    Args:
        architecture: relu, gated, topk, batchtopk or jumprelu.
        sparsity: K of TopK and BatchTopK, the target L0 of JumpReLU, the weight of the L1 of ReLU and gated SAEs.
        d_in: width of the activations.
        d_sae: number of latents.
        whitened: with sae-lens' own `covariance_whitening`, or on raw activations.
        device: where it trains.
        seed: of its initial weights.
    """
    shared = {
        "d_in": d_in,
        "d_sae": d_sae,
        "device": device,
        "normalize_activations": "covariance_whitening" if whitened else "expected_average_only_in",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _STOCK[architecture].build(shared, sparsity)


def _start(architecture: str, whitened: bool, setup: Setup, level: float, seed: int) -> Learner:
    device = pick_device(setup.device)
    return Learner(stock_sae(architecture, level, setup.aip.width, setup.atoms.capacity, whitened, device, seed))


def _finish(learner: Learner, aip: AtomicInnerProduct) -> SAE[Any]:
    """What it has become, on raw activations, through the files that sae-lens writes."""
    with tempfile.TemporaryDirectory() as folder:
        learner.sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=str(learner.sae.device))


for _whitened in (False, True):
    for _name, _one in _STOCK.items():
        register(
            Trained(
                name=f"{_name}_whitened" if _whitened else _name,
                label=f"{_one.label}, whitened" if _whitened else _one.label,
                color=_one.color,
                marker="s" if _whitened else "o",
                sparsity=_one.sparsity,
                least=_one.least,
                by_default=_one.by_default,
                start=partial(_start, _name, _whitened),
                finish=_finish,
            )
        )
