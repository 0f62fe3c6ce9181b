"""Exported folders in plain sae-lens: heads, the model they name, sae-lens' own store; and arguments that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, HookedSAETransformer, SAETransformerBridge, TopKSAE, TopKSAEConfig
from sae_lens.load_model import load_model
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from atom_lens import AtomicInnerProduct, aip_converter, evaluate, load_atoms, open_model, splice, train
from atom_lens.evidence.results import Report
from atom_lens.recipe.reading import check_recipe
from atom_lens.sharing.card import run_card
from atom_lens.sharing.convert import convert
from atom_lens.storage.sealed import seal

GOOD = Path(__file__).parent / "artifacts" / "format-1" / "run" / "blocks.1.hook_resid_post"
FILES = ["cfg.json", "sae_weights.safetensors", "aip.safetensors"]
HEADS = "blocks.1.attn.hook_z"
TOKENS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def trained(model: str, hook: str, tmp_path: Path) -> Path:
    """Atoms of 64 short texts, after a few steps."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"))
    recipe: dict[str, Any] = {
        "name": "run",
        "model": {"name": model, "device": "cpu"},
        "prompts": {"source": "text", "path": str(texts)},
        "hooks": [hook],
        "positions": "last",
        "atoms": {"capacity": 12, "target_l0": 2.0},
        "training": {"steps": 10, "batch_size": 16, "device": "cpu", "nulls": False},
    }
    return train(check_recipe(recipe), out=tmp_path / "runs") / hook


@pytest.fixture
def heads(tiny: str, tmp_path: Path) -> Path:
    return trained(tiny, HEADS, tmp_path)


def hooked() -> HookedSAETransformer:
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=50, act_fn="relu", seed=0
    )
    return HookedSAETransformer(config)


def as_before(folder: Path) -> None:
    """What this package wrote at hook_z until it wrote hook_z there."""
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["reshape_activations"] = "none"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    seal(folder, FILES)


@torch.no_grad()
@pytest.mark.parametrize("load", [SAE.load_from_disk, load_atoms])
def test_heads_in_plain_sae_lens(heads: Path, tiny: str, load: Any) -> None:
    """Where heads lie apart and where they lie side by side, sae-lens computes what a splice does."""
    assert json.loads((heads / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    model, sae = hooked(), load(heads)
    model.run_with_saes(TOKENS, saes=[sae])  # what it leaves in the SAE is not in the way of the next
    theirs, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    assert cache[f"{HEADS}.hook_sae_acts_post"].shape == (2, 7, 12)
    assert cache[f"{HEADS}.hook_sae_output"].shape == (2, 7, 2, 8)
    with splice(model, load_atoms(heads), replace=True):
        torch.testing.assert_close(model(TOKENS), theirs)

    bridge = SAETransformerBridge.boot_transformers(
        "tiny",
        hf_model=AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager"),
        tokenizer=AutoTokenizer.from_pretrained(tiny),
        device="cpu",
    )
    theirs = bridge.run_with_saes(TOKENS, saes=[sae])
    ours = open_model(tiny)
    with splice(ours, load_atoms(heads), replace=True):
        torch.testing.assert_close(ours(TOKENS), theirs)


@torch.no_grad()
def test_heads_apart_and_side_by_side(heads: Path, tmp_path: Path) -> None:
    """Atoms take both and give back what they took; those that were saved before do as well."""
    atoms, x = load_atoms(heads), torch.randn(3, 5, 2, 8)
    as_before(heads)
    old = load_atoms(heads)
    for rows in (x, x.flatten(2), x[0], x.flatten(2)[0], x.flatten(2)[0, :1]):
        flat = rows if rows.shape[-1] == 16 else rows.flatten(-2)
        assert atoms(rows).shape == rows.shape and torch.equal(old(rows), atoms(rows))
        assert torch.equal(atoms.encode(rows), atoms.encode(flat))
    assert load_atoms(heads).decode(torch.zeros(4, 12)).shape == (4, 16)
    old.save_model(tmp_path / "again")
    assert SAE.load_from_disk(tmp_path / "again")(x).shape == x.shape


def test_heads_are_merged_at_their_hook_only(heads: Path) -> None:
    cfg = json.loads((heads / "cfg.json").read_text())
    for hook in ("blocks.1.hook_resid_post", None, "blocks.1.hook_resid_z"):
        cfg["metadata"]["hook_name"] = hook
        (heads / "cfg.json").write_text(json.dumps(cfg))
        seal(heads, FILES)
        with pytest.raises(ValueError, match="reshape_activations is 'hook_z', allowed is 'none' at any other hook"):
            load_atoms(heads)


def test_sae_lens_loads_the_model_and_its_activations(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By nothing but what the folder says of itself, as sae-lens' evals do."""
    monkeypatch.chdir(tmp_path)  # a folder of that name is what transformers opens
    AutoTokenizer.from_pretrained(tiny).save_pretrained("gpt2")
    size: dict[str, Any] = {"vocab_size": 210, "n_positions": 64, "n_ctx": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained("gpt2")
    sae = SAE.load_from_disk(trained("gpt2", "blocks.1.hook_resid_post", tmp_path))
    about = sae.cfg.metadata
    model = load_model(
        about.model_class_name, about.model_name, "cpu", {**about.model_from_pretrained_kwargs}, [about.hook_name]
    )
    data = Dataset.from_dict({"text": ["Paris is a city in the capital of France"] * 64})
    store = ActivationsStore.from_sae(
        model, sae, data, streaming=False, store_batch_size_prompts=8, train_batch_size_tokens=8, n_batches_in_buffer=8
    )
    assert store.context_size == about.context_size == 3  # of the longest prompt, BOS among its tokens
    batch = store.next_batch()
    assert batch.shape[-1] == 16 and torch.isfinite(sae(batch)).all()


@pytest.mark.parametrize("load", [load_atoms, aip_converter])
def test_a_device_that_is_not_there_is_no_damage(load: Any) -> None:
    with pytest.raises(ValueError, match="^device 'abacus' is not available"):
        load(GOOD, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="^device 'cuda' is not available"):
            load(GOOD, device="cuda")
        with pytest.raises(ValueError, match="^device 'cuda' is not available"):
            open_model("no/such-model", device="cuda")
    with pytest.raises(ValueError, match="^dtype is 'int3', allowed are float32,"):
        load_atoms(GOOD, dtype="int3")


def test_one_dictionary_is_not_of_any_hook(tmp_path: Path) -> None:
    """A hook that is asked for and is not the one there used to be passed over in silence."""
    for hook in ("blocks.1.hook_resid_post", "blocks.1.*", "1"):
        load_atoms(GOOD, hook=hook)
    with pytest.raises(ValueError, match="it holds one dictionary, of 'blocks.1.hook_resid_post'"):
        load_atoms(GOOD, hook="blocks.2.hook_resid_post")
    shutil.copytree(GOOD, tmp_path / "mine")
    load_atoms(tmp_path / "mine", hook="mine")


def test_a_local_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may be named as repositories of the Hub are."""
    monkeypatch.chdir(tmp_path)
    report = Report.read(GOOD / "report.json").model_copy(update={"model": "models/tiny"})
    assert "base_model: models/tiny" in run_card({"blocks.1.hook_resid_post": report}, "user/name")
    Path("models/tiny").mkdir(parents=True)
    assert "base_model" not in run_card({"blocks.1.hook_resid_post": report}, "user/name")


def test_a_whitened_checkpoint_of_sae_lens_is_refused(tiny: str, tmp_path: Path) -> None:
    """sae-lens loads it, and its weights are wrong on raw activations."""
    TopKSAE(TopKSAEConfig(8, 16, k=2, normalize_activations="covariance_whitening")).save_model(tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint from the middle of training"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loaded, x = SAE.load_from_disk(tmp_path), torch.randn(40, 8)
    loaded.cfg.metadata.hook_name = "blocks.1.hook_out"
    for use in (
        lambda: evaluate(loaded, x, x, AtomicInnerProduct.estimate(x)),
        lambda: splice(open_model(tiny), {"blocks.1.hook_out": loaded}),
    ):
        with pytest.raises(ValueError, match="is from the middle of a training"):
            use()


def test_arguments_are_not_dropped_in_silence(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="revision is 'main', but model '.*' is local"):
        open_model(tiny, revision="main")
    for use in (lambda: open_model(tiny, device="meta"), lambda: load_atoms(GOOD, device="meta")):
        with pytest.raises(ValueError, match="device is 'meta', allowed are devices that hold values"):
            use()
    jaxtyping.config.update("jaxtyping_disable", True)  # users run without the checks of types that tests have
    try:
        with pytest.raises(ValueError, match="threshold is 'exp', allowed are auto, plain, log"):
            convert(GOOD, tmp_path / "out", threshold="exp")  # pyright: ignore[reportArgumentType]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert not (tmp_path / "out").exists()
