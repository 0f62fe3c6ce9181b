"""Recipes that are given activations in a file, in place of a model and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from atom_lens import harvest, load_atoms, train
from atom_lens.cli import main
from atom_lens.errors import AtomLensError
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import check_recipe
from atom_lens.recipe.split import harvest_for, prompts_of, split_activations
from atom_lens.storage.files import read_json
from atom_lens.studies.evaluate import evaluate_folder
from atom_lens.studies.intervene.run import intervene
from atom_lens.studies.shift import shift

ATOMS = {"capacity": 24, "target_l0": 3}
TRAINING = {"steps": 30, "batch_size": 64, "nulls": False, "device": "cpu"}


def recipe(path: Path, **changes: Any) -> Any:
    return check_recipe(
        {"name": "given", "activations": str(path), "atoms": ATOMS, "training": TRAINING, **changes}, "here"
    )


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(400, 12, generator=generator)


def test_the_same_atoms_as_from_the_model(tiny: str, tmp_path: Path) -> None:
    """Activations written to a file, with the subject of every row, give what the recipe that reads them gives."""
    words = ["Paris", "Lyon", "Rome", "Oslo"]
    prompts = [f"{'x' * i} {word} is" for i in range(40) for word in words]
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(f'{{"text": "{text} {i}", "subject": "{i}"}}' for i, text in enumerate(prompts)), encoding="utf-8"
    )
    hook = "blocks.1.hook_resid_post"
    shared = {"hooks": [hook], "atoms": ATOMS, "training": TRAINING}
    asked = {
        "name": "read",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(tmp_path / "prompts.jsonl")},
        **shared,
    }
    read = check_recipe(asked, "here")
    texts = prompts_of(read)
    found = harvest(tiny, texts, [hook], unique=True, massive_ratio=None, device="cpu")
    np.save(tmp_path / "x.npy", found[hook].numpy())
    subjects = [texts[i].group for i in found.rows[hook][:, 0].tolist()]
    (tmp_path / "subjects.txt").write_text("\n".join(subjects) + "\n", encoding="utf-8")
    given = check_recipe(
        {
            "name": "given",
            "activations": str(tmp_path / "x.npy"),
            "split": {"groups": str(tmp_path / "subjects.txt")},
            **shared,
        },
        "here",
    )
    one, other = train(read, out=tmp_path / "runs"), train(given, out=tmp_path / "runs")
    a, b = (load_file(folder / hook / "sae_weights.safetensors") for folder in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    reports = [read_json(folder / hook / "report.json") for folder in (one, other)]
    assert reports[0]["heldout"] == reports[1]["heldout"] and reports[0]["heldout"]["n"] > 0
    assert load_atoms(other).cfg.metadata.hook_name == hook
    again = evaluate_folder(other, given)
    assert again.heldout is not None and again.heldout.r2 == pytest.approx(reports[1]["heldout"]["r2"])
    # subjects that trained the one are not held out for the other
    with pytest.raises(AtomLensError, match="were trained on"):
        evaluate_folder(other, given.model_copy(update={"split": given.split.model_copy(update={"seed": 5})}))


def test_several_hooks_of_a_safetensors_file(x: torch.Tensor, tmp_path: Path) -> None:
    both = {"blocks.0.hook_resid_post": x.half(), "blocks.1.hook_mlp_out": x[:, :8].contiguous()}
    save_file(both, tmp_path / "x.safetensors")
    asked = recipe(tmp_path / "x.safetensors", hooks=list(both))
    found = harvest_for(asked, prompts_of(asked))
    assert list(found) == list(both) and found["blocks.0.hook_resid_post"].dtype == torch.float32
    assert torch.equal(found["blocks.1.hook_mlp_out"], both["blocks.1.hook_mlp_out"])
    only = recipe(tmp_path / "x.safetensors", hooks=["blocks.1.hook_mlp_out"])
    assert torch.equal(harvest_for(only, prompts_of(only))["blocks.1.hook_mlp_out"], both["blocks.1.hook_mlp_out"])
    with pytest.raises(AtomLensError, match=r"hooks has 'blocks.2.hook_mlp_out', the given .* have blocks.0"):
        prompts_of(recipe(tmp_path / "x.safetensors", hooks=["blocks.2.hook_mlp_out"]))


def test_what_sae_lens_has_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its CacheActivationsRunner: the rows are the model's, and contexts are not torn apart."""
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_vocab=50, act_fn="relu", seed=0, model_name="tiny"
        )
    )
    hook = "blocks.0.hook_resid_post"
    tokens = torch.randint(1, 50, (60, 8), generator=torch.Generator().manual_seed(0))
    Dataset.from_dict({"tokens": tokens.tolist()}).save_to_disk(str(tmp_path / "tokens"))
    config = CacheActivationsRunnerConfig(
        dataset_path=str(tmp_path / "tokens"),
        model_name="tiny",
        model_batch_size=4,
        hook_name=hook,
        d_in=16,
        training_tokens=40 * 8,
        buffer_size_gb=160 * 16 * 4 / 1e9,  # in two buffers of 160 tokens
        context_size=8,
        new_cached_activations_path=str(tmp_path / "cached"),
        prepend_bos=False,
        device="cpu",
        shuffle=False,
    )
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sae_lens.cache_activations_runner.load_model", lambda *_args, **_options: model)
        CacheActivationsRunner(config, override_dataset=Dataset.load_from_disk(str(tmp_path / "tokens"))).run()
    asked = recipe(tmp_path / "cached", hooks=[hook], split={"heldout": 0.25})
    prompts = prompts_of(asked)
    found = harvest_for(asked, prompts)
    assert found[hook].shape == (320, 16)
    _, kept = model.run_with_cache(tokens[:40])
    assert torch.allclose(found[hook], kept[hook].reshape(-1, 16), atol=1e-5)
    split = split_activations(asked, prompts, found, hook)
    assert len(split.heldout) == 80 and len(set(split.subjects)) == 10
    assert {i // 8 for i in split.prompts}.isdisjoint(i // 8 for i in split.heldout_prompts)


def test_what_is_wrong_is_one_sentence(x: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "few.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "gap.txt").write_text("a\n\n" + "b\n" * 398, encoding="utf-8")
    (tmp_path / "no.npy").write_bytes(b"no array")
    (tmp_path / "x.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "flat.npy", x[0].numpy())
    np.save(tmp_path / "nan.npy", np.full((9, 3), np.nan, np.float32))
    for asked, says in [
        (recipe(tmp_path / "none.npy"), "there is no such file"),
        (recipe(tmp_path / "no.npy"), "holds no activations"),
        (recipe(tmp_path / "x.pt"), "allowed are .npy"),
        (recipe(tmp_path / "folder"), "holds no activations"),
        (recipe(tmp_path / "flat.npy"), "shape"),
        (recipe(tmp_path / "nan.npy"), "NaN"),
        (recipe(tmp_path / "x.npy", split={"groups": str(tmp_path / "few.txt")}), "has 2 lines"),
        (recipe(tmp_path / "x.npy", split={"groups": str(tmp_path / "gap.txt")}), "empty line, 2"),
        (recipe(tmp_path / "x.npy", split={"groups": str(tmp_path / "none.txt")}), "none.txt"),
    ]:
        with pytest.raises(AtomLensError, match=says):
            train(asked, out=tmp_path / "runs")
        assert not list((tmp_path / "runs").glob("[!.]*")), says
    for changes, says in [
        ({"prompts": {"source": "cities"}}, "without prompts"),
        ({"activations": None}, "key model is missing"),
        ({"activations": None, "model": {"name": "x"}}, "key prompts is missing"),
    ]:
        with pytest.raises(AtomLensError, match=says):
            recipe(tmp_path / "x.npy", **changes)


def test_what_needs_texts_says_so(x: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x.numpy())
    asked = recipe(tmp_path / "x.npy", intervene={"l0": [3]})
    for call in (lambda: corpus(asked, "activations"), lambda: intervene(asked), lambda: shift(asked)):
        with pytest.raises(AtomLensError, match="needs a model and prompts"):
            call()


def test_studies_of_given_activations(
    x: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: what compares and scales dictionaries needs no model."""
    np.save(tmp_path / "x.npy", x.numpy())
    monkeypatch.chdir(tmp_path)
    asked = {"name": "given", "activations": "x.npy", "atoms": ATOMS, "training": {**TRAINING, "seeds": 1}}
    sections = {
        "compare": {"kinds": ["aip_topk", "topk_whitened"], "l0": [3]},
        "scale": {"n": [100, 200], "capacities": [12, 24]},
    }
    for command, section in sections.items():
        Path("recipe.yaml").write_text(json.dumps({**asked, "name": command, command: section}), encoding="utf-8")
        assert main([command, "recipe.yaml"]) == 0, capsys.readouterr().err
        assert list(read_json(Path("runs") / command / f"{command}.json")["hooks"]) == ["activations"]


def test_rows_are_known_by_what_they_hold(x: torch.Tensor, tmp_path: Path) -> None:
    """Another file may be what is held out, but not a copy of the one trained on; equal rows are on one side."""
    for name, rows in (("train", x[:200]), ("copy", x[:200]), ("other", x[200:])):
        np.save(tmp_path / f"{name}.npy", rows.numpy())
    folder = train(recipe(tmp_path / "train.npy"), out=tmp_path / "runs")
    other = evaluate_folder(folder, recipe(tmp_path / "other.npy"))
    assert other.heldout is not None and other.heldout.n == 40
    with pytest.raises(AtomLensError, match="were trained on"):
        evaluate_folder(folder, recipe(tmp_path / "copy.npy", split={"seed": 3}))
    np.save(tmp_path / "twice.npy", x[:100].repeat(2, 1).numpy())
    asked = recipe(tmp_path / "twice.npy")
    prompts = prompts_of(asked)
    split = split_activations(asked, prompts, harvest_for(asked, prompts), "activations")
    assert {i % 100 for i in split.prompts}.isdisjoint(i % 100 for i in split.heldout_prompts)
