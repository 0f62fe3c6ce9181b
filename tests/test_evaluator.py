"""What sae-lens' trainers log of our evidence while a dictionary learns, of any architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from conftest import shifted
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

import atom_lens
from atom_lens import AtomEvaluator, AtomicInnerProduct
from atom_lens.dictionaries.baselines.stock import _finish
from atom_lens.dictionaries.registry import Learner
from atom_lens.evidence.measure import measure

D, F, STEPS = 16, 32, 60
NAMES = {"r2", "r2_aip", "q_star", "l0", "l0_p998", "empty_codes", "dead", "coherence_p998"}


def batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield from x.split(64)


def settings() -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=64 * STEPS,
        train_batch_size_samples=64,
        lr=3e-3,
        lr_end=3e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=30,
        device="cpu",
        dead_feature_window=100,
        feature_sampling_window=30,
        n_batches_for_norm_estimate=10,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, eval_every_n_wandb_logs=2),
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A real run of W&B that stays here; what was logged to it."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    here = wandb.init(mode="offline", dir=str(tmp_path))
    real = wandb.log
    monkeypatch.setattr(wandb, "log", lambda data, *rest, **more: (logged.append(data), real(data, *rest, **more)))
    yield logged
    here.finish()


def made(kind: str) -> Any:
    shared = {"d_in": D, "d_sae": F, "device": "cpu"}
    if kind == "aip_tsae":
        return atom_lens.TSAETraining(atom_lens.TSAETrainingConfig(target_l0=3.0, first_activations=200, **shared))
    if kind == "aip_pursuit":
        config = atom_lens.PursuitTrainingConfig(k=3.0, first_activations=200, amortised_steps=20, **shared)
        return atom_lens.PursuitTraining(config)
    scaling = "covariance_whitening" if kind == "whitened" else "expected_average_only_in"
    return TopKTrainingSAE(TopKTrainingSAEConfig(k=3, normalize_activations=scaling, **shared))


@pytest.mark.parametrize("kind", ["raw", "whitened", "aip_tsae", "aip_pursuit"])
def test_what_is_logged_last_is_what_the_result_is_worth(
    kind: str, offline: list[dict[str, Any]], generator: torch.Generator
) -> None:
    x, heldout = shifted(1300, D, generator).split(1000)
    aip = AtomicInnerProduct.estimate(x)
    evaluator = AtomEvaluator(heldout, aip, then=lambda *_: {"others": 1.0})
    sae = made(kind)
    SAETrainer(settings(), sae, batches(x), evaluator).fit()
    found = [one for one in offline if "others" in one]
    assert len(found) == STEPS // 10 and set(found[-1]) >= {"others", *(f"atoms/{name}" for name in NAMES)}
    finished = sae.finish() if hasattr(sae, "finish") else _finish(Learner(sae), aip)
    figures = measure(finished, heldout, aip)
    last = found[-1]
    assert last["atoms/r2"] == pytest.approx(figures.r2, abs=0.01)
    assert last["atoms/r2_aip"] == pytest.approx(figures.r2_aip, abs=0.01)
    assert last["atoms/l0"] == pytest.approx(figures.l0.mean, abs=0.05)
    assert last["atoms/coherence_p998"] == pytest.approx(figures.coherence.p998, abs=0.01)


def test_several_at_once(offline: list[dict[str, Any]], generator: torch.Generator) -> None:
    x, heldout = shifted(1300, D, generator).split(1000)
    saes = {"one": made("raw"), "two": made("whitened"), "elsewhere": made("raw")}
    hooks = {"one": "a", "two": "a", "elsewhere": "b"}
    stream = ({"a": one, "b": one} for one in batches(x))
    MultiSAETrainer(settings(), saes, hooks, stream, AtomEvaluator({"a": heldout}).several).fit()
    found = [one for one in offline if any("atoms/" in name for name in one)]
    assert len(found) == STEPS // 10
    assert set(found[-1]) == {f"{name}/atoms/{key}" for name in ("one", "two") for key in NAMES}


def test_a_recipe_logs_its_report_too(
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept: dict[str, Any] = {}
    real = wandb.sdk.wandb_summary.Summary.update
    monkeypatch.setattr(
        wandb.sdk.wandb_summary.Summary, "update", lambda self, data: (kept.update(data), real(self, data))
    )
    code, _, err = run("--quiet", wandb={"mode": "offline"})
    assert code == 0, err
    report = json.loads((tmp_path / "runs" / "tiny" / "report.json").read_text())
    [logged] = kept["report"].values()
    assert logged["heldout"]["r2"] == report["heldout"]["r2"] and "random" in logged["nulls"]
