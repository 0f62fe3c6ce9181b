"""Parts of the page that need no browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from atom_lens import open_model
from atom_lens.dictionaries import kind
from atom_lens.studies.points import Measured, over_layers
from atom_lens.studies.report.run import write_page
from atom_lens.studies.report.words import columns, is_residual, lens_of


def test_lens_is_the_models_own(tiny: str, tmp_path: Path) -> None:
    """Against transformers alone: the direction through the final norm, RMSNorm or LayerNorm, and the unembedding."""
    directions = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    shutil.copytree(tiny, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    vocabulary = AutoModelForCausalLM.from_pretrained(tiny).config.vocab_size
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(1)
    other = GPT2LMHeadModel(config)
    other.transformer.ln_f.weight.data.uniform_(0.2, 2)
    other.transformer.ln_f.bias.data.normal_(std=5)  # stands in every logit, whatever the atom
    other.save_pretrained(tmp_path / "gpt2")
    for folder in (tiny, str(tmp_path / "gpt2")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
        with torch.no_grad():
            logits = (norm(directions) - norm(-directions)) @ model.get_output_embeddings().weight.T
        lens = lens_of(open_model(folder, device="cpu"))
        up, down = lens.top(directions)
        assert torch.equal(up, logits.topk(8).indices) and torch.equal(down, (-logits).topk(8).indices)
        words = columns(lens, directions)
        assert words["table"][words["up"][8]] == lens.tokenizer.decode([int(up[1, 0])])
    assert is_residual("blocks.3.hook_mlp_out") and not is_residual("blocks.3.attn.hook_z")


def units(*cells: tuple[str, float | None]) -> list[Measured]:
    return [Measured(kind(unit), kind(unit).asked(level), [{}]) for unit, level in cells]


def test_curves_over_layers_stand_beside_each_other() -> None:
    """What no sparsity is asked of is in every plot; an L1 weight of 3 is not a K of 3."""
    each = [("null_data", 3), ("neurons", None), ("topk", 3), ("topk", 6), ("relu_whitened", 3)]
    hooks = {f"blocks.{layer}.hook_resid_post": units(*each) for layer in range(3)}
    hooks["blocks.1.hook_resid_post"] = units(*each, ("mine", None), ("principal", 6))
    found = over_layers(hooks)
    names = {title: [[one.kind.label for one in here[layer]] for layer in here] for title, here in found.items()}
    at = "hook_resid_post"
    assert set(names) == {f"{at}, asked 3", f"{at}, asked 6", f"{at}, L1 3"}
    assert names[f"{at}, asked 3"][0] == ["null: data points", "TopK", "neurons"]
    assert names[f"{at}, asked 3"][1] == ["null: data points", "TopK", "neurons", "mine"]
    assert names[f"{at}, asked 6"][1] == ["TopK", "principal directions", "neurons", "mine"]
    assert names[f"{at}, L1 3"][2] == ["ReLU, whitened", "neurons"]
    assert list(over_layers({hook: units(("neurons", None)) for hook in hooks})) == [at]
    assert over_layers({"blocks.1.hook_resid_post": units(*each)}) == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", '{"schema_version": 2}', "key n, field required"),
        ("report.json", '{"hooks": []}', "key hooks is [], allowed is a report for each hook"),
        ("report.json", '{"hooks": {}}', "key hooks is {}, allowed is a report for each hook"),
        ("report.json", '{"hooks": {"a": 1}}', "it has 1 where a mapping is needed"),
        ("scale.json", '{"schema_version": 1, "model": "m", "versions": {}}', "key hooks, field required"),
        (
            "scale.json",
            '{"schema_version": 1, "model": "m", "versions": {}, "hooks": {}}',
            "key hooks, dictionary should",
        ),
        ("compare.json", '{"schema_version": 2, "hooks": {}, "versions": {}}', "key model, field required"),
        (
            "intervene.json",
            '{"schema_version": 2, "name": "n", "n": 1, "scan": {}, "model": "m", "versions": {}, "hook": "h",'
            ' "n_facts": 1, "n_answers": 1,'
            ' "class_means": {}, "cells": []}',
            "key class_means.flips, field required",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "recipe.yaml").write_text("name: bad")
    (tmp_path / "bad" / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        write_page([tmp_path / "bad"])
    assert str(caught.value).startswith(f"'{tmp_path}/bad/{name}' is damaged: ") and message in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other' has nothing that a page can show, allowed are"):
        write_page([tmp_path / "other"])
    with pytest.raises(ValueError, match="runs is empty, a page needs at least one folder"):
        write_page([])
    (tmp_path / "other" / "scale.json").write_text("{")
    with pytest.raises(ValueError, match="is not strict JSON"):
        write_page([tmp_path / "other"])
    (tmp_path / "other" / "scale.json").write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="scale.json' has schema_version 7, this version of atom-lens reads 1"):
        write_page([tmp_path / "other"])
    assert not (tmp_path / "report.html").exists()
