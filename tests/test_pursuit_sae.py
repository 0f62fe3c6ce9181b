"""The pursuit dictionary as an sae-lens architecture: its codes, gradients, files, and that it meets what is asked."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shifted
from sae_lens import SAE, TopKSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from safetensors.torch import load_file, save_file
from sklearn.linear_model import orthogonal_mp
from support.live import HOOK, TOKENS, open_model

from atom_lens import AtomicInnerProduct, load_atoms, splice
from atom_lens.dictionaries import Setup, find_kind
from atom_lens.dictionaries.aip_topk import AIPTopK
from atom_lens.dictionaries.encoders import Refit, bias_of, under_pursuit
from atom_lens.dictionaries.metered import training_whitening
from atom_lens.dictionaries.pursuit.sae import PursuitSAE, PursuitSAEConfig, pursuit_map
from atom_lens.dictionaries.pursuit.training import PursuitTraining, PursuitTrainingConfig, coherence_penalty
from atom_lens.errors import AtomLensError
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.storage.sealed import seal
from atom_lens.training.fit import fit_one

ABOUT = {"model_name": "none", "hook_name": "blocks.0.hook_resid_post"}


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return shifted(600, 12, generator)


def made(x: torch.Tensor, n_atoms: int = 40, **config: Any) -> PursuitSAE:
    """Rows of `x` as atoms, all thresholds 0."""
    sae = PursuitSAE(PursuitSAEConfig(d_in=x.shape[1], d_sae=n_atoms, metadata=SAEMetadata(**ABOUT), **config))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(dim=0))
        sae.W_dec.copy_(x[:n_atoms] - sae.b_dec)
    sae.aip = AtomicInnerProduct.estimate(x, source="test")
    return sae


def trained(x: torch.Tensor, architecture: str = "aip_pursuit", **pursuit: Any) -> Any:
    asked = {"capacity": 40, "target_l0": 3, "architecture": architecture, "pursuit": pursuit}
    settings = Training(steps=120, batch_size=64, lr=3e-3, device="cpu")
    aip = AtomicInnerProduct.estimate(x[:400], source="test")
    return fit_one(x[:400], aip, Atoms.model_validate(asked), settings, ABOUT, calibration=x[400:])[0]


def test_both_are_registered() -> None:
    assert get_sae_class("aip_pursuit") == (PursuitSAE, PursuitSAEConfig)
    assert get_sae_training_class("aip_pursuit") == (PursuitTraining, PursuitTrainingConfig)
    assert get_sae_class("aip_topk")[0] is AIPTopK


def test_a_threshold_for_all_and_one_for_each(x: torch.Tensor) -> None:
    """An atom whose own threshold is out of reach is as good as none: the others' codes are those of one threshold."""
    whole, without = made(x, 40, max_iterations=6), made(x, 39, max_iterations=6)
    without.calibrate(x, 3.0)
    with torch.no_grad():
        whole.threshold.copy_(torch.cat([without.threshold, torch.tensor([1e6])]))
    codes = without.encode(x)
    torch.testing.assert_close(whole.encode(x), torch.cat([codes, torch.zeros(len(x), 1)], dim=1))
    assert float((codes != 0).sum(dim=1).double().mean()) == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0])
def test_codes_are_those_of_scikit_learn(x: torch.Tensor, norm: float) -> None:
    """One-sided choice and unsigned coincide where all correlations are made positive: d and -d are both atoms."""
    sae = made(x, 24, max_iterations=3, norm=norm)
    with torch.no_grad():
        sae.W_dec[12:] = -sae.W_dec[:12]
    codes = sae.encode(x[100:300]).detach().double()
    signed = (codes[:, :12] - codes[:, 12:]).numpy()
    # The norm by hand: weights lambda^alpha in the eigenbasis, in the coordinates where the AIP is Euclidean.
    values, vectors = sae.aip.eigenvalues.numpy(), sae.aip.eigenvectors.numpy()
    into = vectors * np.sqrt(values ** (norm - 1))
    atoms = sae.W_dec[:12].detach().double().numpy() @ into
    norms = np.linalg.norm(atoms, axis=1)
    rows = (x[100:300] - sae.b_dec).detach().double().numpy() @ into
    expected = orthogonal_mp((atoms / norms[:, None]).T, rows.T, n_nonzero_coefs=3).T / norms
    same = ((signed != 0) == (expected != 0)).all(axis=1)
    # Where a coefficient changes its sign in a later fit, a one-sided code lets that atom go.
    assert same.mean() > 0.9
    np.testing.assert_allclose(signed[same], expected[same], rtol=1e-3, atol=1e-4)


def test_codes_do_not_depend_on_the_coordinates(x: torch.Tensor, generator: torch.Generator) -> None:
    """x -> A x with the metric estimated again: the AIP, and so the pursuit in it, is the same."""
    sae = made(x, max_iterations=4)
    sae.calibrate(x, 2.5)
    a = torch.randn(12, 12, generator=generator) + 3 * torch.eye(12)
    moved = x @ a.T
    other = made(moved, max_iterations=4)
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec @ a.T)
        other.threshold.copy_(sae.threshold)
    other.aip = AtomicInnerProduct.estimate(moved, ridge=0.0)
    sae.aip = AtomicInnerProduct.estimate(x, ridge=0.0)
    one, two = sae.encode(x).detach(), other.encode(moved).detach()
    same = ((one != 0) == (two != 0)).all(dim=1)
    assert float(same.double().mean()) > 0.99, "all but ties within float32"
    torch.testing.assert_close(one[same], two[same], rtol=1e-2, atol=1e-2)


def test_calibration_meets_the_mean_l0(x: torch.Tensor) -> None:
    sae = made(x, max_iterations=8)
    for l0 in (1.5, 3.0, 5.0):
        sae.calibrate(x, l0)
        assert float((sae.encode(x) != 0).sum(dim=1).double().mean()) == pytest.approx(l0, rel=0.01)
    assert float((sae.encode(x) != 0).sum(dim=1).max()) <= 8


@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_the_gradient_at_fixed_codes_is_that_of_the_loss(x: torch.Tensor, norm: float) -> None:
    """Envelope theorem: against finite differences of the loss with the pursuit done anew."""
    aip = AtomicInnerProduct.estimate(x)
    config = PursuitTrainingConfig(
        d_in=12, d_sae=20, k=3.0, max_iterations=4, amortised_steps=0, norm=norm, start="data"
    )
    sae = PursuitTraining(config).double()
    y = x.double() @ training_whitening(aip).matrix
    sae.prepare(y.float(), aip, torch.Generator().manual_seed(0))
    batch = TrainStepInput(y[:64], {}, None, 0, False)
    sae.learn(batch)  # sets the threshold

    def loss() -> torch.Tensor:
        threshold = sae.threshold.clone()
        found = sae.learn(batch).loss
        sae.threshold.copy_(threshold)
        return found

    loss().backward()
    assert sae.W_dec.grad is not None
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(sae.W_dec.shape, generator=generator, dtype=torch.float64)
        # Atoms are projected to unit norm before each step: along these directions that is no change to first order.
        direction -= (direction * sae.W_dec.detach()).sum(dim=1, keepdim=True) * sae.W_dec.detach()
        start, step = sae.W_dec.detach().clone(), 1e-6
        ends = []
        for sign in (1, -1):
            sae.W_dec.data.copy_(start + sign * step * direction)
            ends.append(float(loss()))
        sae.W_dec.data.copy_(start)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((sae.W_dec.grad * direction).sum()), rel=1e-3, abs=1e-7)


def test_codes_can_be_differentiated(x: torch.Tensor) -> None:
    """On their support codes are linear in the activation; finite differences in float32, whose steps are large."""
    sae = made(x, max_iterations=3)
    rows = x[100:110].clone().requires_grad_(True)
    weights = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    (sae.encode(rows) * weights).sum().backward()
    direction = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        ends = [sae.encode(x[100:110] + sign * step * direction) for sign in (1, -1)]
    stays = ((ends[0] != 0) == (ends[1] != 0)).all(dim=1)
    slope = (((ends[0] - ends[1]) * weights).sum(dim=1) / (2 * step))[stays]
    assert rows.grad is not None and int(stays.sum()) >= 7
    torch.testing.assert_close((rows.grad * direction).sum(dim=1)[stays], slope, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("architecture", ["aip_pursuit", "aip_topk"])
def test_files_hold_all_of_it(x: torch.Tensor, tmp_path: Path, architecture: str) -> None:
    atoms = trained(x, architecture)
    atoms.save_model(tmp_path / "atoms")
    back = load_atoms(tmp_path / "atoms")
    assert type(back) is type(atoms) and torch.equal(back.encode(x), atoms.encode(x))
    assert torch.equal(back.aip.metric, atoms.aip.metric) and back.aip.source == "test"
    back.save_model(tmp_path / "again")
    for name in ("sae_weights.safetensors", "aip.safetensors", "cfg.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "atoms" / name).read_bytes()
    plain = SAE.load_from_disk(tmp_path / "atoms")
    torch.testing.assert_close(plain(x), atoms(x))
    assert isinstance(plain, PursuitSAE if architecture == "aip_pursuit" else TopKSAE)


def test_topk_is_plain_for_those_who_do_not_have_us(x: torch.Tensor, tmp_path: Path) -> None:
    atoms = trained(x, "aip_topk")
    atoms.save_model(tmp_path / "atoms")
    torch.save((x, atoms.encode(x).detach()), tmp_path / "codes.pt")
    script = (
        "import sys, torch; from sae_lens import SAE, TopKSAE\n"
        f"sae = SAE.load_from_disk({str(tmp_path / 'atoms')!r})\n"
        f"x, codes = torch.load({str(tmp_path / 'codes.pt')!r})\n"
        "assert type(sae) is TopKSAE and 'atom_lens' not in sys.modules\n"
        "torch.testing.assert_close(sae.encode(x), codes)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "it holds W_dec, aip_eigenvalues, aip_eigenvectors, b_dec, allowed are"),
        ({"W_dec": torch.full((40, 12), torch.nan)}, "W_dec has NaN or infinite values"),
        ({"aip_eigenvalues": torch.ones(12, dtype=torch.float64)}, "aip_eigenvalues of the weights is not what"),
        ({"aip_eigenvalues": torch.ones(12)}, "aip_eigenvalues is F32"),
    ],
)
def test_damaged_weights_are_refused(x: torch.Tensor, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made(x).save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    found = {name: value for name, value in {**load_file(weights), **changes}.items() if value is not None}
    save_file(found, weights)
    seal(tmp_path, ["cfg.json", "sae_weights.safetensors", "aip.safetensors"])
    with pytest.raises(AtomLensError, match=message):
        load_atoms(tmp_path)


def test_folding_norms_changes_no_reconstruction(x: torch.Tensor) -> None:
    sae = made(x, max_iterations=3)
    before, codes = sae(x).detach(), sae.encode(x).detach()
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(sae(x).detach(), before, rtol=1e-3, atol=1e-3)
    assert float(((sae.encode(x) != 0) == (codes != 0)).double().mean()) > 0.999


def test_no_precision_moves_the_metric(x: torch.Tensor) -> None:
    sae = made(x, max_iterations=3)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    assert half.W_dec.dtype == torch.bfloat16 and torch.equal(half.aip.metric, sae.aip.metric)
    assert half.encode(x.bfloat16()).dtype == torch.bfloat16


def test_changed_atoms_are_seen(x: torch.Tensor) -> None:
    """What is prepared for the search is made again when atoms, metric or device change."""
    sae = made(x, max_iterations=3)
    sae.encode(x)
    with torch.no_grad():
        sae.W_dec.copy_(x[40:80] - sae.b_dec)
    fresh = made(x, max_iterations=3)
    with torch.no_grad():
        fresh.W_dec.copy_(x[40:80] - fresh.b_dec)
    assert torch.equal(sae.encode(x), fresh.encode(x))
    metric = AtomicInnerProduct.estimate(x[:50])
    sae.aip = fresh.aip = metric
    assert torch.equal(sae.encode(x), fresh.encode(x))


@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_training_meets_the_l0_and_beats_its_start(x: torch.Tensor, norm: float) -> None:
    start = trained(x, amortised=0.0, norm=norm, start="data")
    held = x[400:]
    assert float((start.encode(held) != 0).sum(dim=1).double().mean()) == pytest.approx(3, rel=0.02)
    raw = made(x[:400], 40, max_iterations=6, norm=norm)
    raw.calibrate(held, 3.0)
    into = pursuit_map(start.aip, norm).float()

    def left(sae: SAE[Any]) -> float:
        return float(((held - sae(held)).detach() @ into).square().sum())

    assert left(start) < left(raw)


def test_the_coherence_penalty(x: torch.Tensor) -> None:
    """It is the sum over pairs, and atoms trained with it are less coherent under the metric."""
    gram = np.corrcoef(x[:30].numpy())
    centred = x[:30] - x[:30].mean(dim=1, keepdim=True)
    assert float(coherence_penalty(centred)) == pytest.approx(((gram**2).sum() - 30) / 30, rel=1e-4)
    assert float(coherence_penalty(torch.eye(12)[:7] * 3)) == pytest.approx(0, abs=1e-6)
    free, held = (trained(x, coherence_coefficient=weight) for weight in (0.0, 0.3))
    of = [float(coherence_penalty(one.W_dec.double() @ pursuit_map(one.aip, 0.0))) for one in (free, held)]
    assert 40 / 12 - 1 < of[1] < 0.9 * of[0]
    with pytest.raises(AtomLensError, match="coherence_coefficient is -1"):
        PursuitTrainingConfig(d_in=12, d_sae=20, k=3.0, coherence_coefficient=-1.0)


def test_seeds_are_independent_and_repeatable(x: torch.Tensor) -> None:
    setup = Setup(x, AtomicInnerProduct.estimate(x), Atoms(capacity=20, target_l0=2))
    kind: Any = find_kind("aip_pursuit")
    one, two, again = (kind.start(setup, 2.0, seed).sae.W_dec for seed in (0, 1, 0))
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_a_refit_is_numpys(x: torch.Tensor) -> None:
    topk = trained(x, "aip_topk")
    bias = bias_of(topk)
    codes = Refit(topk, topk.aip, bias).encode(x[:50])
    assert bool(((codes != 0) <= (topk.encode(x[:50]) != 0)).all())
    into = pursuit_map(topk.aip, 0.0).numpy()
    for row, code, own in zip(x[:50], codes, topk.encode(x[:50]), strict=True):
        chosen = own.nonzero()[:, 0]
        atoms = topk.W_dec[chosen].detach().double().numpy() @ into
        rest = (row - bias).detach().double().numpy() @ into
        expected = np.linalg.lstsq(atoms.T, rest, rcond=None)[0]
        np.testing.assert_allclose(code[chosen].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_other_atoms_under_a_pursuit(x: torch.Tensor) -> None:
    atoms = torch.cat([x[:30] - x.mean(dim=0), torch.zeros(3, 12)])
    aip = AtomicInnerProduct.estimate(x)
    found = under_pursuit(atoms, x.mean(dim=0), aip, x[30:], 2.0)
    assert found.W_dec.shape == (30, 12)
    assert float((found.encode(x[30:]) != 0).sum(dim=1).double().mean()) == pytest.approx(2, rel=0.01)
    with pytest.raises(AtomLensError, match="a pursuit needs at least one"):
        under_pursuit(torch.zeros(3, 12), x.mean(dim=0), aip, x, 2.0)


@pytest.mark.parametrize("backend", ["hooked", "bridge", "nnsight"])
def test_splice(tiny: str, backend: str) -> None:
    """Edits, generation and gradients in a live model, one token at a time too."""
    live = open_model(backend, tiny)
    sae = PursuitSAE(PursuitSAEConfig(d_in=16, d_sae=40, max_iterations=5, metadata=SAEMetadata(hook_name=HOOK)))
    plain, generated = live.logits(TOKENS), live.generate(TOKENS, 3)
    with splice(live.model, sae, replace=True) as s:
        replaced = live.logits(TOKENS)
        s.ablate()
        emptied = live.logits(TOKENS)
    assert not torch.allclose(replaced, plain) and not torch.allclose(replaced, emptied)
    with splice(live.model, sae) as s:  # what the atoms leave over stays: an edit that changes no code changes nothing
        s.scale(list(range(40)), 1.0)
        torch.testing.assert_close(live.logits(TOKENS), plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(live.generate(TOKENS, 3), generated)
        s.scale(list(range(40)), torch.tensor(2.0, requires_grad=True))
        assert not torch.allclose(live.logits(TOKENS), plain)
    assert torch.equal(live.logits(TOKENS), plain)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm": 1.5}, "norm is 1.5, allowed is 0"),
        ({"max_iterations": 0}, "max_iterations is 0, allowed is at least 1"),
    ],
)
def test_bad_settings_are_one_sentence(config: dict[str, Any], message: str) -> None:
    with pytest.raises(AtomLensError, match=message):
        PursuitSAEConfig(d_in=4, d_sae=8, **config)
    with pytest.raises(AtomLensError, match="k is 9, allowed is 1 to max_iterations=4"):
        PursuitTrainingConfig(d_in=4, d_sae=20, k=9.0, max_iterations=4)
    sae = PursuitSAE(PursuitSAEConfig(d_in=4, d_sae=8))
    with torch.no_grad():
        sae.W_dec[3] = 0
    with pytest.raises(AtomLensError, match="atom 3 has norm 0"):
        sae.encode(torch.ones(1, 4))
