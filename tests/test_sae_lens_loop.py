"""Our architectures in sae-lens' own loop: its trainers, runner and command line, from activations to a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from sae_lens import (
    SAE,
    JumpReLUSAE,
    LoggingConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from support.architectures import D, F, K, config_of, planted, sae

from atom_lens import (
    AtomicInnerProduct,
    evaluate,
    faithfulness,
    load_atoms,
)
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.checkpoint import Batches
from atom_lens.training.fit import fit_one

BATCH = 256
HOOK = "blocks.1.hook_resid_post"


def settings(steps: int, **options: Any) -> SAETrainerConfig:
    """sae-lens' settings for what `Training` says by default; batches that only tell the start come on top."""
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=round(0.05 * steps),
        lr_decay_steps=round(0.3 * steps),
        dead_feature_window=200,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )


def stream(x: torch.Tensor) -> Iterator[torch.Tensor]:
    return (batch["x"] for batch in Batches({"x": x}, BATCH, seed=0))


def measured(atoms: Any, x: torch.Tensor) -> tuple[float, float]:
    """Explained variance, and the mean L0."""
    with torch.no_grad():
        codes = atoms.encode(x)
        return faithfulness(x, atoms.decode(codes)), float((codes > 0).sum(1).double().mean())


@pytest.fixture(scope="module")
def expected() -> float:
    """Held-out explained variance of what `fit` makes of the same rows."""
    x, heldout = planted(24_000).split(20_000)
    training = Training(steps=1500, batch_size=BATCH, device="cpu")
    return measured(fit_one(x, AtomicInnerProduct.estimate(x), Atoms(capacity=F, target_l0=K), training)[0], heldout)[0]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["sparse", "dense"])
def test_a_trainer_trains_what_fit_does(step: Any, expected: float, tmp_path: Path) -> None:
    x, heldout = planted(24_000).split(20_000)
    trained = SAETrainer(settings(1504), sae(step=step), stream(x)).fit()
    trained.save_inference_model(tmp_path)
    atoms = load_atoms(tmp_path)
    r2, l0 = measured(atoms, heldout)
    assert expected > 0.4 and abs(r2 - expected) < 0.01 and abs(l0 / K - 1) < 0.1
    assert measured(trained.eval(), heldout) == pytest.approx((r2, l0), rel=1e-3), "as it stands, too"
    assert (atoms.aip.n, atoms.aip.source) == (1024, "first 1024 activations of training")
    assert torch.equal(atoms.aip.metric, AtomicInnerProduct.estimate(torch.cat(first(x, 4))).metric)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is JumpReLUSAE and torch.equal(plain(heldout), atoms(heldout))


def first(x: torch.Tensor, batches: int) -> list[torch.Tensor]:
    every = stream(x)
    return [next(every) for _ in range(batches)]


def test_nothing_is_learned_before_the_start() -> None:
    """The optimizer does not move, no atom dies of waiting, and the last batch is cut where enough are there."""
    x, one = planted(4000), sae(first_activations=2 * BATCH + 10)
    trainer = SAETrainer(settings(100), one, stream(x))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    every = stream(x)
    for number in range(2):
        output = trainer.step(next(every))
        assert float(output.loss.detach()) == 0 and not trainer.optimizer.state, number
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    trainer.step(next(every))
    assert one.aip is not None and one.aip.n == 2 * BATCH + 10 and not trainer.optimizer.state
    assert int(trainer.n_forward_passes_since_fired.max()) == 0
    start = one.W_dec.detach().clone()
    assert float(trainer.step(next(every)).loss.detach()) > 0 and trainer.optimizer.state
    assert not torch.equal(one.W_dec, start)


def test_logged_figures_are_of_activations_as_they_are() -> None:
    x, one = planted(4000), sae()
    one.begin(x, AtomicInnerProduct.estimate(x), torch.Generator().manual_seed(0))
    output = one.training_forward_pass(TrainStepInput(x[:64], {"l0": 0.1}, None, 0, True))
    assert torch.equal(output.sae_in, x[:64])
    inside = one.training_forward_pass(TrainStepInput(x[:64], {"l0": 0.1}, None, 0, False))
    assert output.sae_out.shape == inside.sae_out.shape and not torch.equal(inside.sae_in, x[:64])
    assert float((output.sae_out - x[:64]).norm() / x[:64].norm()) < 1


def test_several_at_once_are_each_alone() -> None:
    x = {"a": planted(4000), "b": planted(4000).flip(1) * 2}
    alone = {name: SAETrainer(settings(30), seeded(), stream(rows)).fit() for name, rows in x.items()}
    both = {name: seeded() for name in x}
    MultiSAETrainer(settings(30), both, {"a": "a", "b": "b"}, Batches(x, BATCH, seed=0)).fit()
    for name, one in both.items():
        expected, found = alone[name].finish(), one.finish()
        assert found.aip.n == 1024 and torch.equal(found.aip.metric, expected.aip.metric)
        assert torch.equal(found.W_dec, expected.W_dec) and torch.equal(found.threshold, expected.threshold)


def seeded(**options: Any) -> Any:
    torch.manual_seed(0)
    return sae(**options)


def test_a_start_is_the_seeds() -> None:
    """Of the configuration, whatever the global generator is."""
    x = planted(4000)
    found = []
    for seed, everywhere in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(everywhere)
        found.append(SAETrainer(settings(12), sae(seed=seed), stream(x)).fit().finish())
    assert torch.equal(found[0].W_dec, found[1].W_dec) and not torch.equal(found[0].W_dec, found[2].W_dec)


def test_a_training_too_short_is_no_dictionary(tmp_path: Path) -> None:
    short = SAETrainer(settings(3), sae(), stream(planted(4000))).fit()
    message = (
        "training ended after 768 activations, but the first 1024 only give the metric and the start: train on more, or"
    )
    for ask in (short.finish, lambda: short.save_inference_model(tmp_path / "none")):
        with pytest.raises(ValueError, match=message):
            ask()
    assert not (tmp_path / "none").exists()


def test_rows_that_are_no_numbers_are_refused() -> None:
    x = planted(1024)
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="x has 1 rows with NaN or infinite values"):
        SAETrainer(settings(20), sae(), stream(x)).fit()


def test_massive_rows_are_told(caplog: pytest.LogCaptureFixture) -> None:
    x = planted(2048)
    x[::100] *= 100
    with caplog.at_level("WARNING"):
        SAETrainer(settings(6), sae(first_activations=500), iter(x.split(BATCH))).fit()
    assert "5 of the first 500 activations of training have more than 10 times the median norm" in caplog.text


def test_a_dictionary_still_in_training_is_not_measured() -> None:
    x = planted(4000)
    trained = SAETrainer(settings(6), sae(), stream(x)).fit()
    with pytest.raises(ValueError, match="the dictionary is still in training"):
        evaluate(trained, x[:500])
    assert evaluate(trained.finish(), x[:500], x[500:1000], trained.aip).heldout is not None


# --- what sae-lens asks of every architecture -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("aip_topk", {"loss_norm": 2.0}, "loss_norm is 2.0, allowed is 0"),
        ("aip_topk", {"start": "zero"}, "start is 'zero', allowed are 'data' and 'random'"),
        ("aip_topk", {"noise": -1.0}, "noise is -1.0, allowed is 0 or more"),
        ("aip_topk", {"normalize_activations": "layer_norm"}, "'layer_norm', allowed for aip_topk is 'none'"),
        ("aip_pursuit", {"norm": -0.1}, "norm is -0.1, allowed is 0"),
        ("aip_pursuit", {"k": 9.0}, "k is 9, allowed is 1 to max_iterations=6"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    architecture: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have to stop them earlier
    with pytest.raises(ValueError, match=message):
        config_of(architecture, 3, d_in=D, d_sae=F, **options)


@pytest.mark.parametrize(
    ("architecture", "options", "least"),
    [
        ("aip_topk", {}, 0.65),
        pytest.param("aip_pursuit", {"amortised_steps": 200}, 0.9, marks=pytest.mark.slow),
    ],
)
def test_a_trainer_trains_pursuits_too(
    architecture: Any, options: dict[str, Any], least: float, tmp_path: Path
) -> None:
    """As well as `fit` does; a pursuit meets its mean L0 on rows it has not seen, and explains far more of them."""
    x, heldout = planted(8_000, D // 2, F // 4, K // 2).split(6_000)
    recipe = Atoms(architecture=architecture, capacity=F // 4, target_l0=K // 2)
    training = Training(steps=600, batch_size=BATCH, lr=3e-3, device="cpu")
    expected, _ = measured(fit_one(x, AtomicInnerProduct.estimate(x), recipe, training)[0], heldout)
    one = sae(architecture, K // 2, d_in=D // 2, d_sae=F // 4, first_activations=2048, **options)
    trained = SAETrainer(replace(settings(608), lr=3e-3), one, stream(x)).fit()
    trained.save_inference_model(tmp_path)
    atoms = load_atoms(tmp_path)
    r2, l0 = measured(atoms, heldout)
    assert r2 > expected - 0.02 and r2 > least and abs(l0 / (K // 2) - 1) < 0.1
    assert atoms.aip.source == "first 2048 activations of training"
    assert measured(trained.eval(), heldout) == pytest.approx((r2, l0), rel=1e-2), "as it stands, too"
    plain = SAE.load_from_disk(tmp_path)  # which rounds the metric of a pursuit to float32
    assert float((plain(heldout) - atoms(heldout)).norm() / heldout.norm()) < 1e-3
