"""Stock SAEs of sae-lens as its users train them, on raw activations and with its own whitening."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from sae_lens import (
    SAE,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
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
    """An architecture: its label, how `build` makes it from shared settings and a level, and the look of its family."""

    label: str
    build: Callable[[dict[str, Any], float], TrainingSAE[Any]]
    color: str
    sparsity: Sparsity = "l0"
    least: float = 0.0
    by_default: bool = True
    whitens: bool = True


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
    "abstopk": _Stock(
        "AbsTopK",
        lambda shared, k: AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(k=round(k), **shared)),
        "#5f7fa8",
        least=1.0,
        by_default=False,
    ),
    "matryoshka_batchtopk": _Stock(
        "Matryoshka BatchTopK",
        lambda shared, k: MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=_nested(shared["d_sae"]), **shared)
        ),
        "#4f8f5b",
        least=1.0,
        by_default=False,
    ),
    # Its encoder is tied to the decoder, so no whitening can be folded in.
    "matching_pursuit": _Stock(
        "matching pursuit",
        lambda shared, k: MatchingPursuitTrainingSAE(
            MatchingPursuitTrainingSAEConfig(max_iterations=round(k), decoder_init_norm=1.0, **shared)
        ),
        "#7a5c3e",
        least=1.0,
        by_default=False,
        whitens=False,
    ),
}


def _nested(d_sae: int) -> list[int]:
    """An eighth, a quarter and a half of the latents, and all."""
    return sorted({max(1, d_sae // share) for share in (8, 4, 2, 1)})


def stock_sae(
    architecture: str, sparsity: float, d_in: int, d_sae: int, whitened: bool, device: str, seed: int
) -> TrainingSAE[Any]:
    """A stock training SAE of sae-lens, with its defaults.

    Args:
        architecture: relu, or as sae-lens names it: gated, topk, batchtopk, jumprelu, ...
        sparsity: the weight of the L1 of ReLU and gated SAEs, the target L0 of JumpReLU, K of all others.
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
    """The trained SAE on raw activations, by way of the files that sae-lens writes."""
    with tempfile.TemporaryDirectory() as folder:
        learner.sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=str(learner.sae.device))


for _whitened in (False, True):
    for _name, _one in ((name, one) for name, one in _STOCK.items() if one.whitens or not _whitened):
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
