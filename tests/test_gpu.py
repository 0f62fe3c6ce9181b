"""The same on an accelerator, where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import shifted
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from support.learners import tsae_learner

from atom_lens import AtomicInnerProduct, Prompt, evaluate, harvest, load_atoms, open_model, splice, stability
from atom_lens.activations.backends import BackendName
from atom_lens.activations.connect import wrap_backend
from atom_lens.dictionaries.tsae.sparse import search
from atom_lens.interventions.attribution import attribution, read
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.studies.planted.run import Learning, learn
from atom_lens.training.checkpoint import Checkpoints
from atom_lens.training.fit import fit_one, fit_together

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_training_and_evidence(generator: torch.Generator, tmp_path) -> None:
    x, heldout = shifted(500, 12, generator).split([400, 100])
    aip = AtomicInnerProduct.estimate(x)
    trained = {}
    for device in ("cpu", "cuda"):
        settings = Training(steps=60, batch_size=64, device=device)
        # Without noise, of which each device draws its own.
        atoms, _ = fit_one(x, aip, Atoms(capacity=40, target_l0=3.0, noise=0), settings)
        assert atoms.W_dec.device.type == device
        trained[device] = atoms
        trained[f"{device} report"] = evaluate(atoms, x, heldout)
    # Wherever the rows lie, all is measured where the atoms are.
    there = evaluate(trained["cuda"], x.cuda(), heldout.cuda())
    torch.testing.assert_close(trained["cuda"].W_dec.cpu(), trained["cpu"].W_dec, rtol=1e-2, atol=1e-2)
    for split in ("train", "heldout"):
        on_cpu, on_gpu = (trained[f"{device} report"][split] for device in ("cpu", "cuda"))
        assert on_gpu["r2"] == pytest.approx(on_cpu["r2"], abs=0.02)
        assert on_gpu["r2"] == pytest.approx(there[split]["r2"], abs=1e-5)
        for name, null in trained["cuda report"]["nulls"].items():
            assert null[split]["r2"] == pytest.approx(there["nulls"][name][split]["r2"], abs=1e-5)
    trained["cuda"].save_model(tmp_path)


def test_a_search_misses_none(generator: torch.Generator) -> None:
    """In bfloat16, of many terms, which a GPU may sum in parts that it rounds."""
    x, directions = torch.randn(64, 4096, generator=generator), torch.randn(256, 4096, generator=generator)
    exact = x.double() @ directions.double().T
    cutoff = exact.amax(dim=0).float() * (1 - 2**-20)
    entries, _ = search(x.cuda(), directions.cuda(), cutoff.cuda(), "bfloat16")
    found = torch.zeros(exact.shape, dtype=torch.bool)
    found[entries.rows.cpu(), entries.columns.cpu()] = True
    assert found[exact > cutoff].all() and found.sum() < found.numel() / 2


def test_stability(generator: torch.Generator) -> None:
    atoms, l0 = torch.randn(500, 20, generator=generator), torch.randint(0, 6, (300,), generator=generator)
    assert stability(atoms.cuda(), l0.cuda()).q_star == stability(atoms, l0).q_star


def test_harvest(tiny: str, tmp_path) -> None:
    texts = ["Rome is a city in Italy", "Oslo is"]
    for backend in ("transformer_lens", "nnsight"):
        on_cpu, on_gpu = (
            harvest(tiny, texts, "blocks.1.hook_resid_post", "last", backend, device=d, store=tmp_path / backend / d)
            for d in ("cpu", "cuda")
        )
        torch.testing.assert_close(
            on_gpu["blocks.1.hook_resid_post"], on_cpu["blocks.1.hook_resid_post"], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_stays_where_it_was_asked_for(tiny: str, backend: BackendName, device: str) -> None:
    """A pipeline of transformers, which nnsight makes of a model, would move it to the first GPU."""
    assert wrap_backend(open_model(tiny, backend=backend, device=device)).device.type == device


@pytest.mark.parametrize("kind", ["tsae_free", "aip_pursuit"])
def test_planted_dictionaries_are_marked(kind: str, tmp_path: Path) -> None:
    learning = Learning.model_validate({"n": 500, "kinds": [kind], "atoms": {"capacity": 48, "target_l0": 2}})
    found = learn(learning, Training(steps=20, batch_size=64, device="cuda"), 0, tmp_path)
    assert all(0 < mark.mcc <= 1 and mark.kind == kind for mark in found.marks)


def test_splice_and_attribution(tiny: str) -> None:
    """Atoms on either device in a model on the GPU do what they do on the CPU."""
    hook, facts = "blocks.1.hook_resid_post", [Prompt.fill("{} is a city in the", name) for name in ("Rome", "Oslo")]
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=40, metadata=SAEMetadata(hook_name=hook)))
    sae.W_enc.data.normal_(std=20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 20, 31, 42, 5]])
    found = []
    for model_device, atoms_device in (("cpu", "cpu"), ("cuda", "cpu"), ("cuda", "cuda")):
        model = open_model(tiny, device=model_device)
        sae.to(atoms_device)
        with torch.no_grad(), splice(model, sae) as s:
            s.ablate(range(10), positions=-1).add([3], torch.tensor([5.0]))
            logits = model(tokens.to(model_device)).cpu()
        found.append((logits, attribution(sae, read(model, hook, facts, ["Italy", "of Italy"])).cpu()))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("product", ["float32", "bfloat16"])
def test_the_same_bits_again(generator: torch.Generator, product: Literal["float32", "bfloat16"]) -> None:
    """Sums over entries go in one order, also where many blocks of a GPU share them out."""
    x = shifted(4000, 256, generator)
    aip = AtomicInnerProduct.estimate(x)
    settings = Training(steps=15, batch_size=512, device="cuda")
    first, again = (
        fit_one(x, aip, Atoms(capacity=1024, target_l0=12.0, encoder_product=product), settings)[0] for _ in range(2)
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_saved_on_a_gpu_loads_on_a_cpu(generator: torch.Generator, tmp_path: Path) -> None:
    x = shifted(200, 12, generator)
    settings = Training(steps=20, batch_size=64, device="cuda")
    atoms, _ = fit_one(x, AtomicInnerProduct.estimate(x), Atoms(capacity=40, target_l0=3.0), settings)
    atoms.save_model(tmp_path)
    on_cpu = load_atoms(tmp_path)
    for name, value in on_cpu.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, atoms.state_dict()[name].cpu())
    assert load_atoms(tmp_path, device="cuda").W_dec.device.type == "cuda"


def test_resumed_on_a_gpu(generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is drawn on the device: its generator goes on, too."""
    x = shifted(200, 12, generator)
    aip = AtomicInnerProduct.estimate(x)
    settings = Training(steps=20, batch_size=64, device="cuda", checkpoint_minutes=0)
    whole = tsae_learner(x, aip, Atoms(capacity=40, target_l0=3.0), "cuda")
    fit_together({"x": x}, {"tsae": whole}, settings)
    path, real = tmp_path / "checkpoint.safetensors", Checkpoints.keep

    def stopping(self: Checkpoints) -> None:
        real(self)
        if self.trainer.n_training_steps == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "keep", stopping)
        learner = tsae_learner(x, aip, Atoms(capacity=40, target_l0=3.0), "cuda")
        fit_together({"x": x}, {"tsae": learner}, settings, checkpoint=path)
    resumed = tsae_learner(x, aip, Atoms(capacity=40, target_l0=3.0), "cuda")
    fit_together({"x": x}, {"tsae": resumed}, settings, checkpoint=path)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
