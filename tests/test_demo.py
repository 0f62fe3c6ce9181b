"""The real demo model, bridge and nnsight: harvests agree, exported atoms splice exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from scipy.stats import beta

from atom_lens import AtomicInnerProduct, harvest, load_atoms, splice
from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import DEMO, find_model, load_model
from atom_lens.activations.prompts.cities import Cities
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.cli import main
from atom_lens.dictionaries.baselines.bases import neurons, principal
from atom_lens.dictionaries.nulls import Pursuit, random_atoms
from atom_lens.evidence.measure import observe
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.fit import fit_one

pytestmark = pytest.mark.demo
HOOK = "blocks.9.hook_resid_post"
TEXTS = ["The Eiffel Tower is located in the city of", "Paris is", "Kyoto is a city in the country of Japan"]


def test_harvests_agree(demo: str, tmp_path: Path) -> None:
    """TransformerLens and nnsight, padded batches of different lengths, three kinds of hooks, the last layer too."""
    prompts = [*Cities(limit=20).read(), Prompt.fill("The mayor of {} said that", "Rio de Janeiro")]
    hooks = [HOOK, "blocks.5.hook_mlp_out", "blocks.9.mlp.hook_post", "blocks.17.hook_resid_post"]
    lens, nnsight = (
        harvest(demo, prompts, hooks, backend=backend, store=tmp_path / backend)
        for backend in ("transformer_lens", "nnsight")
    )
    assert lens["blocks.9.mlp.hook_post"].shape == (21, 2048)
    for hook in hooks:
        assert float((lens[hook] - nnsight[hook]).norm() / lens[hook].norm()) < 1e-5
    alone = harvest(demo, prompts[-1:], hooks, store=tmp_path / "alone")
    for hook in hooks:
        assert float((alone[hook] - lens[hook][-1:]).norm() / alone[hook].norm()) < 1e-5


def test_the_model_is_the_real_one(demo: str) -> None:
    model, tokenizer = load_model(find_model(DEMO), torch.float32, "cpu")
    ids = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        after = model(**ids).logits[0, -1].argmax()
    assert tokenizer.decode(after).strip() == "Paris"
    assert find_model(DEMO).path == demo, "the model is converted once"


@pytest.fixture(scope="module")
def atoms_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("atoms")


@pytest.fixture
def exported(demo: str, atoms_folder: Path) -> Path:
    """Atoms of layer 9 on 700 cities, briefly trained: what matters here is that they are exact, not good."""
    if not (atoms_folder / "cfg.json").exists():
        x = harvest(demo, Cities(limit=700).read(), HOOK)[HOOK]
        aip = AtomicInnerProduct.estimate(x, source="700 cities")
        atoms, _ = fit_one(
            x,
            aip,
            Atoms(capacity=1280, target_l0=8.0),
            Training(steps=20, device="cpu"),
            {"model_name": DEMO, "hook_name": HOOK, "prepend_bos": True},
        )
        atoms.save_model(atoms_folder)
    return atoms_folder


def test_plain_sae_lens_reconstructs_the_same(demo: str, exported: Path, tmp_path: Path) -> None:
    x = harvest(demo, Cities(limit=700).read(), HOOK)[HOOK][:200]
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch; from sae_lens import SAE\n"
        f"sae = SAE.load_from_disk({str(exported)!r}); x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "assert 'atom_lens' not in sys.modules\n"
        f"torch.save(sae(x).detach(), {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    ours = load_atoms(exported)(x).detach()
    theirs = torch.load(tmp_path / "out.pt")
    assert float((ours - theirs).norm() / ours.norm()) < 1e-5
    assert float((ours - x).norm() / (x - x.mean(0)).norm()) < 1.0, "the atoms explain something"


def test_spliced_logits_agree(demo: str, exported: Path) -> None:
    """Attached to a SAETransformerBridge, and spliced by hand into an nnsight trace: the same logits."""
    atoms = load_atoms(exported)
    source = find_model(DEMO)
    model, tokenizer = load_model(source, torch.float32, "cpu")
    bridge = SAETransformerBridge.boot_transformers(source.path, hf_model=model, tokenizer=tokenizer, device="cpu")
    nnsight: Any = open_backend(source, "nnsight", torch.float32, "cpu").model
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            clean = bridge(ids)
            with bridge.saes(atoms):
                spliced = bridge(ids)
            with bridge.saes(SAE.load_from_disk(exported)):
                plain = bridge(ids)
            with bridge.saes(atoms, use_error_term=True):
                with_error = bridge(ids)
            with nnsight.trace({"input_ids": ids}):
                residual = nnsight.model.layers[9].output
                nnsight.model.layers[9].output[:] = atoms.decode(atoms.encode(residual))
                by_nnsight = nnsight.output.logits.save()
        assert torch.equal(spliced, plain)
        torch.testing.assert_close(by_nnsight, spliced, rtol=0, atol=1e-4)
        torch.testing.assert_close(with_error, clean, rtol=0, atol=1e-4)
        assert float((spliced - clean).abs().max()) > 0.1, "the splice did something"


def test_splice_on_the_real_model(demo: str, exported: Path) -> None:
    """Bridge and nnsight: nothing changes without an edit, and every edit does the same, padded and in generation."""
    atoms, source = load_atoms(exported), find_model(DEMO)
    bridge: Any = open_backend(source, "transformer_lens", torch.float32, "cpu")
    traced: Any = open_backend(source, "nnsight", torch.float32, "cpu")
    tokenizer = bridge.tokenizer
    tokenizer.padding_side = "left"
    padded = tokenizer(TEXTS, return_tensors="pt", padding=True)
    alone = tokenizer(TEXTS[:1], return_tensors="pt")
    codes = atoms.encode(harvest(demo, ["Rome is", "Kyoto is", "Oslo is"], HOOK, "last")[HOOK]).detach()
    edits: dict[str, Any] = {
        "none": lambda s: s,
        "same": lambda s: s.scale(None, 1.0),
        "ablate": lambda s: s.ablate(positions=-1),
        "scale": lambda s: s.scale(range(0, 1280, 2), 3.0, positions=[-2, -1]),
        "set": lambda s: s.set([3, 4], 50.0, positions=-1),
        "add": lambda s: s.add([5], 5000.0),
        "keep only": lambda s: s.keep_only(range(40), positions=-1),
        "swap": lambda s: s.swap(codes[0], positions=-1, items=[0]),
        "exchange": lambda s: s.exchange(codes[0], codes[1]),
        "patch": lambda s: s.patch(torch.zeros(640), positions=-1),
    }
    for batch in (padded, alone):
        arguments = (batch.input_ids, batch.attention_mask, 1)
        with torch.no_grad():
            clean = {name: backend.logits(*arguments) for name, backend in (("lens", bridge), ("nnsight", traced))}
            for name in edits if batch is padded else ("none", "swap", "exchange"):
                edit, found = edits[name], []
                for backend in (bridge, traced):
                    with splice(backend.model, atoms) as s:
                        edit(s)
                        found.append(backend.logits(*arguments))
                torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4, msg=name)
                if name in ("none", "same"):
                    torch.testing.assert_close(found[0], clean["lens"], rtol=0, atol=1e-5)
                    torch.testing.assert_close(found[1], clean["nnsight"], rtol=0, atol=1e-5)
                else:
                    assert float((found[0] - clean["lens"]).abs().max()) > 1e-3, name
    ids, said = alone.input_ids, {}
    for name in ("clean", "none", "same", "add"):
        with splice(bridge.model, atoms) as s, splice(traced.model, atoms) as t:
            for one in (s, t) if name != "clean" else ():
                edits[name](one)
            by_bridge = bridge.model.generate(ids, max_new_tokens=5, do_sample=False, verbose=False)
            with traced.model.generate(ids, max_new_tokens=5, do_sample=False) as tracer:
                by_nnsight = tracer.result.save()
        assert torch.equal(by_bridge, by_nnsight)
        said[name] = tokenizer.decode(by_bridge[0, ids.shape[1] :])
    assert "Paris" in said["clean"] and said["clean"] == said["none"] == said["same"] != said["add"]


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.slow
def test_the_headline_is_reached_and_what_it_is_worth_is_said(demo: str, tmp_path: Path, capsys: Any) -> None:
    """In-sample R² and q* of the paper, the nulls beside them, one sentence on n / F."""
    assert main(["train", str(RECIPES / "headline.yaml"), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "headline" / "report.json").read_text())
    assert report["train"]["r2"] >= 0.999 and report["train"]["q_star"] >= 0.998
    assert report["heldout"]["r2"] < 0.5 < 0.999 < report["nulls"]["data"]["train"]["r2"]
    assert report["nulls"]["random"]["train"]["q_star"] >= 0.998 and report["nulls"]["random"]["train"]["r2_aip"] < 0.1
    printed = capsys.readouterr().out
    assert "q* is no evidence here" in printed
    assert "held-out" in printed and "n / F = 1.00: 2560 activations for 2560 atoms" in printed


@pytest.mark.slow
def test_the_traps_on_real_activations(demo: str) -> None:
    """Neurons have R² 1 and a q* that arithmetic predicts; random directions are stable at small K; R² is not."""
    hook = "blocks.9.hook_resid_post"
    x = harvest(DEMO, Cities(limit=1500).read(), hook, "subject_last", unique=True)[hook].float()
    aip = AtomicInnerProduct.estimate(x)
    d = x.shape[1]
    seen = observe(neurons(x), x, aip).figures
    # A pair of random directions has cos² ~ Beta(1/2, (d - 1)/2), and K = d asks for |cos| < 1 / (2d - 1).
    predicted = beta.cdf(1 / (2 * d - 1) ** 2, 0.5, (d - 1) / 2)
    assert seen["r2"] == pytest.approx(1) and predicted / 2 < seen["q_star"] < 2 * predicted
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 3, 4):
        null = Pursuit(random_atoms(2560, aip, generator), x.mean(dim=0), aip, k)
        found = observe(null, x[:500], aip).figures
        assert found["q_star"] >= 0.998 and found["r2_aip"] < 0.1
    every = observe(principal(x, aip, d), x, aip).figures
    assert every["q_star"] == 1.0 and every["r2"] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_shift_on_three_layers(demo: str, tmp_path: Path, capsys: Any) -> None:
    """Euclidean angles do not centre on 90 degrees; under the metric of the same distribution they do."""
    fewer = ["prompts.limit=1200", "other_text.limit=40"]
    assert main(["shift", str(RECIPES / "shift.yaml"), *fewer, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "shift" / "shift.json").read_text())["hooks"]
    assert len(found) == 3
    for angles in (matrix["prompts"] for matrix in found.values()):
        assert angles["euclidean"]["mean"] < 75
        assert angles["seen"]["mean"] == pytest.approx(90, abs=0.5)
        assert angles["under"]["prompts"]["mean"] == pytest.approx(90, abs=0.5)
        assert angles["under"]["other text"]["mean"] < 85
    assert "under other text" in capsys.readouterr().out
