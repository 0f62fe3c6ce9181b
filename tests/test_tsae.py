"""The architecture: registered with sae-lens, exact through export and loading, refused where it would be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shifted
from sae_lens import SAE, JumpReLUSAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from support.learners import tsae_learner

from atom_lens import (
    TSAE,
    AtomicInnerProduct,
    TSAEConfig,
    TSAETraining,
    TSAETrainingConfig,
    aip_converter,
    evaluate,
    load_atoms,
)
from atom_lens.dictionaries.metered import training_whitening
from atom_lens.dictionaries.registry import finish
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.storage.sealed import seal
from atom_lens.training.checkpoint import Batches
from atom_lens.training.fit import fit_one, fit_together


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return shifted(400, 12, generator)


@pytest.fixture(params=["tied", "free"])
def atoms(request: pytest.FixtureRequest, x: torch.Tensor) -> TSAE:
    return train(x, request.param)


def train(x: torch.Tensor, encoder: str = "tied", seed: int = 0, steps: int = 60) -> TSAE:
    aip = AtomicInnerProduct.estimate(x, source="test")
    recipe = Atoms(capacity=40, target_l0=3.0, encoder=encoder)  # pyright: ignore[reportArgumentType]
    settings = Training(steps=steps, batch_size=64, seed=seed, device="cpu")
    return fit_one(x, aip, recipe, settings, {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"})[0]


def test_is_registered() -> None:
    assert get_sae_class("aip_tsae") == (TSAE, TSAEConfig)
    assert get_sae_training_class("aip_tsae") == (TSAETraining, TSAETrainingConfig)


def test_reloading_registers_the_newest_classes() -> None:
    script = (
        "import importlib, atom_lens.dictionaries.tsae.sae; from sae_lens.registry import get_sae_class\n"
        "module = importlib.reload(atom_lens.dictionaries.tsae.sae)\n"
        "assert get_sae_class('aip_tsae') == (module.TSAE, module.TSAEConfig)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_tied_encoder_is_the_theorems(x: torch.Tensor) -> None:
    """W_enc = S D up to the length of the atoms: the encoder reads the AIP of an activation with each atom."""
    atoms = train(x, "tied")
    expected = (atoms.W_dec.double() @ atoms.aip.metric).T
    cosine = torch.nn.functional.cosine_similarity(expected, atoms.W_enc.double(), dim=0)
    torch.testing.assert_close(cosine, torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-6)


def test_training_space_is_the_metrics(x: torch.Tensor) -> None:
    aip = AtomicInnerProduct.estimate(x)
    whitening = training_whitening(aip)
    y = x.double() @ whitening.matrix
    torch.testing.assert_close(y @ whitening.inverse_matrix, x.double())
    torch.testing.assert_close(y @ y.T, aip.whiten(x) @ aip.whiten(x).T / 12)


@pytest.mark.parametrize("encoder", ["tied", "free"])
def test_folding_keeps_codes_and_reconstructions(x: torch.Tensor, encoder: Any) -> None:
    """The same atoms in whitened space (while they learn) and on raw activations (after)."""
    aip = AtomicInnerProduct.estimate(x)
    sae = TSAETraining(TSAETrainingConfig(d_in=12, d_sae=40, target_l0=3.0, encoder=encoder))
    sae.begin(x, aip, torch.Generator().manual_seed(0))
    atoms = sae.finish()
    before, after = sae.encode(x), atoms.encode(x)
    norms = (atoms.W_dec.norm(dim=1) - 1).abs()
    assert norms.max() < 1e-6
    assert torch.equal(before > 0, after > 0)
    torch.testing.assert_close(atoms.decode(after), sae.decode(before), rtol=1e-4, atol=1e-4)
    assert torch.equal(atoms.aip.metric, aip.metric)


def test_same_seed_same_atoms(x: torch.Tensor) -> None:
    first, second, other = train(x, seed=1), train(x, seed=1), train(x, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.W_dec, other.W_dec)


def test_training_is_independent_of_the_global_generator(x: torch.Tensor) -> None:
    torch.manual_seed(123)
    first = train(x)
    drawn = torch.rand(1)
    torch.manual_seed(123)
    assert torch.equal(torch.rand(1), drawn), "training must not move the user's generator"
    assert torch.equal(first.W_dec, train(x).W_dec)


def test_plain_sae_lens_loads_the_folder(atoms: TSAE, x: torch.Tensor, tmp_path: Path) -> None:
    """In a process that never imports atom_lens: the same reconstructions."""
    atoms.save_model(tmp_path / "atoms")
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch; from sae_lens import SAE\n"
        f"sae = SAE.load_from_disk({str(tmp_path / 'atoms')!r}); x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "assert 'atom_lens' not in sys.modules and type(sae).__name__ == 'JumpReLUSAE', type(sae)\n"
        "assert sae.cfg.metadata.hook_name == 'blocks.0.hook_resid_post'\n"
        f"torch.save(sae(x).detach(), {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), atoms(x).detach(), rtol=1e-5, atol=1e-5)
    assert set(load_file(tmp_path / "atoms" / "sae_weights.safetensors")) == {
        *("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    }


def test_round_trip_with_the_metric(atoms: TSAE, x: torch.Tensor, tmp_path: Path) -> None:
    atoms.save_model(tmp_path)
    loaded = load_atoms(tmp_path)
    assert torch.equal(loaded.aip.metric, atoms.aip.metric)
    assert (loaded.aip.n, loaded.aip.source) == (400, "test")
    assert torch.equal(loaded(x), atoms(x))
    upgraded = SAE.load_from_disk(tmp_path, converter=aip_converter)
    assert isinstance(upgraded, TSAE) and torch.equal(upgraded.aip.metric, atoms.aip.metric)
    again = tmp_path / "again"
    loaded.save_model(again)
    for file in ("sae_weights.safetensors", "aip.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_metric_is_never_rounded(atoms: TSAE, tmp_path: Path) -> None:
    atoms.save_model(tmp_path)
    exact = atoms.aip.metric
    for loaded in (load_atoms(tmp_path, dtype="bfloat16"), load_atoms(tmp_path).to(torch.bfloat16)):
        assert loaded.W_dec.dtype == torch.bfloat16
        assert torch.equal(loaded.aip.metric, exact)
    assert torch.equal(load_atoms(tmp_path).half().double().aip.metric, exact)


def test_a_metric_of_another_width_is_refused(atoms: TSAE, generator: torch.Generator, tmp_path: Path) -> None:
    narrow = AtomicInnerProduct.estimate(shifted(50, 7, generator))
    with pytest.raises(ValueError, match="metric has width 7, these atoms have d_in 12"):
        atoms.aip = narrow
    atoms.save_model(tmp_path)
    narrow.save(tmp_path / "aip.safetensors")
    seal(tmp_path, ["cfg.json", "sae_weights.safetensors", "aip.safetensors"])
    with pytest.raises(ValueError, match="metric has width 7, the weights have d_in 12"):
        load_atoms(tmp_path)
    (tmp_path / "aip.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="aip.safetensors"):
        load_atoms(tmp_path)


def test_checkpoint_from_the_middle_is_refused(x: torch.Tensor, tmp_path: Path) -> None:
    sae = TSAETraining(TSAETrainingConfig(d_in=12, d_sae=40, target_l0=3.0))
    sae.begin(x, AtomicInnerProduct.estimate(x), torch.Generator().manual_seed(0))
    config = SAETrainerConfig(
        total_training_samples=640,
        train_batch_size_samples=64,
        lr_end=1e-4,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
    )
    SAETrainer(config, sae, (batch["x"] for batch in Batches({"x": x}, 64, seed=0))).fit()
    (checkpoint,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="checkpoint from the middle of training"):
        SAE.load_from_disk(checkpoint)
    resumed = TrainingSAE.load_from_disk(checkpoint)
    assert isinstance(resumed, TSAETraining) and resumed.aip is not None and sae.aip is not None
    assert torch.equal(resumed.aip.metric, sae.aip.metric) and resumed.aip.n == 400
    with pytest.raises(ValueError, match="the dictionary is still in training"):
        evaluate(resumed, x, x, resumed.aip)


def test_dead_atoms_get_a_gradient(x: torch.Tensor) -> None:
    aip = AtomicInnerProduct.estimate(x)
    sae = TSAETraining(TSAETrainingConfig(d_in=12, d_sae=40, target_l0=3.0, encoder="free"))
    sae.begin(x, aip, torch.Generator().manual_seed(0))
    sae.threshold.data[5] = 1e6
    dead = torch.zeros(40, dtype=torch.bool)
    dead[5] = True
    output = sae.training_forward_pass(TrainStepInput(x, {"l0": 0.1}, dead, 0, False))
    output.loss.backward()
    assert sae.W_dec.grad is not None and sae.W_enc.grad is not None
    assert sae.W_dec.grad[5].norm() > 0 and sae.W_enc.grad[:, 5].norm() > 0
    without = sae.training_forward_pass(TrainStepInput(x, {"l0": 0.1}, None, 0, False))
    assert "revival_loss" in output.losses and "revival_loss" not in without.losses


def test_loss_weights_interpolate_between_the_norms(x: torch.Tensor) -> None:
    """alpha = 1 weights the whitened residual to the Euclidean one, alpha = 0 leaves the AIP's."""
    aip = AtomicInnerProduct.estimate(x)
    for alpha in (0.0, 1.0):
        sae = TSAETraining(TSAETrainingConfig(d_in=12, d_sae=40, target_l0=3.0, loss_norm=alpha))
        sae.begin(x, aip, torch.Generator().manual_seed(0))
        y = sae.scaler(x)
        weighted = (y - y.mean(0)).square() * sae.loss_weight
        assert float(weighted.sum(1).mean()) == pytest.approx(1.0, rel=1e-4)
        norm = x - x.mean(0) if alpha else aip.whiten(x) - aip.whiten(x).mean(0)
        ratio = weighted.sum(1).double() / norm.double().square().sum(1)
        assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_l0": None}, "target_l0 is missing, allowed is a number above 0 and up to d_sae=40"),
        ({"target_l0": 0.0}, "aip_tsae: key target_l0 is 0.0, allowed is greater than 0"),
        ({"target_l0": 41.0}, "target_l0 is 41.0, allowed is up to atoms.capacity=40"),
        ({"loss_norm": 2.0}, "key loss_norm is 2.0, allowed is less than or equal to 1"),
        ({"jumprelu_bandwidth": 0.0}, "aip_tsae: key bandwidth is 0.0, allowed is greater than 0"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is 'covariance_whitening', allowed"),
    ],
)
def test_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TSAETrainingConfig(**{"d_in": 12, "d_sae": 40, "target_l0": 3.0, **change})


@pytest.mark.slow
def test_target_l0_is_met(generator: torch.Generator) -> None:
    """The L0 asked for is the L0 that comes out, for most single activations too."""
    truth = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    active = torch.rand(4000, 64, generator=generator) < 4 / 64
    x = (active * (1 + torch.rand(4000, 64, generator=generator))) @ truth
    aip = AtomicInnerProduct.estimate(x)
    for target in (2.0, 4.0):
        recipe = Atoms(capacity=64, target_l0=target)
        atoms, _ = fit_one(x, aip, recipe, Training(steps=1500, batch_size=128, device="cpu"))
        l0 = (atoms.encode(x) > 0).sum(1).float()
        assert float(l0.mean()) == pytest.approx(target, rel=0.25)
        assert float(l0.quantile(0.95)) <= target + 3


def test_learning_together_is_learning_alone(x: torch.Tensor) -> None:
    """One pass for several learners changes none of them; another seed starts elsewhere."""
    aip = AtomicInnerProduct.estimate(x)
    recipe, settings = Atoms(capacity=40, target_l0=3.0), Training(steps=30, batch_size=64, device="cpu")
    both = {str(seed): tsae_learner(x, aip, recipe, seed=seed) for seed in (0, 1)}
    sparsity = fit_together({"x": x}, both, settings)
    together = [finish(learner, aip) for learner in both.values()]
    alone, alone_sparsity = fit_one(x, aip, recipe, settings)
    assert torch.equal(together[0].W_dec, alone.W_dec) and torch.equal(together[0].threshold, alone.threshold)
    assert torch.equal(sparsity["0"], alone_sparsity)
    assert not torch.equal(together[1].W_dec, alone.W_dec)


def test_starts(x: torch.Tensor) -> None:
    """From data the first atoms are centred activations; a frozen decoder starts at random and stays there."""
    aip = AtomicInnerProduct.estimate(x)
    recipe, settings = Atoms(capacity=40, target_l0=3.0), Training(steps=20, batch_size=64, device="cpu")
    rows = torch.nn.functional.normalize(aip.whiten(x) - aip.whiten(x).mean(0), dim=1)

    def nearest(learner: Any) -> torch.Tensor:
        whitened = learner.sae.W_dec.detach().double() @ learner.sae.scaler.whitening.inverse_matrix @ aip.sqrt
        return (torch.nn.functional.normalize(whitened, dim=1) @ rows.T).amax(dim=1)

    random = Atoms(capacity=40, target_l0=3.0, start="random")
    assert float(nearest(tsae_learner(x, aip, recipe)).min()) > 0.999
    assert float(nearest(tsae_learner(x, aip, random)).median()) < 0.95
    frozen = tsae_learner(x, aip, recipe, freeze_decoder=True)
    before = frozen.sae.W_dec.detach().clone()
    fit_together({"x": x}, {"frozen": frozen}, settings)
    torch.testing.assert_close(frozen.sae.W_dec.detach(), before)
    assert float(nearest(tsae_learner(x, aip, recipe, freeze_decoder=True)).median()) < 0.95


def test_plain_jumprelu_has_the_same_weights(atoms: TSAE, x: torch.Tensor, tmp_path: Path) -> None:
    atoms.save_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is JumpReLUSAE
    assert torch.equal(plain(x), atoms(x))
    assert SAEMetadata.from_dict(plain.cfg.metadata.to_dict()).aip["n"] == 400
