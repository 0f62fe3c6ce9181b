"""Dashboards for Neuronpedia: sae-dashboard's classes read them, and their numbers are those of the codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shifted
from support.auditing import HOOK, topk

from atom_lens import open_model
from atom_lens.cli import main
from atom_lens.dictionaries.load import load_dictionary
from atom_lens.studies.audit.run import audit


@pytest.fixture
def folder(stock: Path, text: Path, tmp_path: Path) -> Path:
    options = ["--text", str(text), "--tokens", "1500", "--loss-tokens", "0", "--device", "cpu"]
    assert main(["audit", str(stock), *options, "--neuronpedia", str(tmp_path / "np")]) == 0
    [made] = (tmp_path / "np").iterdir()
    return made


def latents(folder: Path) -> list[dict[str, Any]]:
    batch = json.loads((folder / "batch-0.json").read_text())
    assert (batch["layer"], batch["sae_id_suffix"], batch["sae_set"]) == (1, None, folder.name)
    return batch["features"]


def test_sae_dashboard_reads_them(folder: Path) -> None:
    """With the classes of its own runner; what they write again is what we have written."""
    theirs = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="needs sae-dashboard")
    written = json.loads((folder / "batch-0.json").read_text())
    assert theirs.NeuronpediaDashboardBatch(**written).to_dict() == written


def test_values_are_those_of_the_dictionary(folder: Path, stock: Path, tiny: str) -> None:
    """A token's value is the coefficient there when the model reads the context again; 0 where it was read before."""
    atoms, model = load_dictionary(stock), open_model(tiny, device="cpu")
    words = model.tokenizer
    checked = 0
    for latent in latents(folder):
        assert len(latent["freq_hist_data_bar_heights"]) == 40 or not latent["activations"]
        for one in latent["activations"]:
            ids = words(" ".join(one["tokens"]), return_tensors="pt").input_ids
            assert ids.shape[1] == len(one["tokens"]) + 1
            with torch.no_grad():
                x = model.run_with_cache(ids)[1][HOOK][0, 1:]
                codes = atoms.encode(x)[:, latent["feature_index"]].numpy()
            values = np.array(one["values"])
            assert np.allclose(values[values != 0], codes[values != 0], atol=2e-3)
            size = abs(values[one["qualifying_token_index"]])
            assert size == np.abs(values).max()
            if one["bin_contains"] >= 0:
                assert one["bin_min"] - 1e-3 <= size <= one["bin_max"] + 1e-3
            checked += 1
    assert checked > 50


def test_counts_and_words(folder: Path, stock: Path, tiny: str) -> None:
    """TopK with k = 3: shares that fire add up to 3; words against the unembedding behind the final norm's gain."""
    found = latents(folder)
    assert [latent["feature_index"] for latent in found] == list(range(40))
    assert sum(latent["frac_nonzero"] for latent in found) == pytest.approx(3, abs=1e-9)
    model = open_model(tiny, device="cpu")
    gain = model.original_model.model.norm.weight
    logits = load_dictionary(stock).W_dec @ (gain[:, None] * model.W_U)
    for latent, row in zip(found, logits, strict=True):
        best = row.topk(10)
        assert latent["pos_str"] == model.tokenizer.batch_decode(best.indices[:, None].tolist())
        assert np.allclose(latent["pos_values"], best.values.detach(), atol=2e-3)
        assert sum(latent["logits_hist_data_bar_heights"]) == len(row)
        top = [one for one in latent["activations"] if one["bin_max"] == 99]
        sizes = [max(map(abs, one["values"])) for one in top]
        assert sizes == sorted(sizes, reverse=True) and len(top) <= 20


def test_what_cannot_be_shown(stock: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert main(["audit", str(stock), "--text", str(text), "--neuronpedia", str(tmp_path / "full")]) == 2
    assert "full' is not empty: choose another or remove it" in capsys.readouterr().err
    x = shifted(300, 16, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="neuronpedia is given, it is allowed with text but not with x_train"):
        audit(topk(), x[:200], x[200:], neuronpedia=tmp_path / "np")
    with pytest.raises(ValueError, match="hook is 'hook_embed', dashboards for Neuronpedia need text, and a hook of a"):
        audit(topk(model_name="x", hook_name="hook_embed"), text=["a b"], neuronpedia=tmp_path / "np")
    assert not (tmp_path / "np").exists()
