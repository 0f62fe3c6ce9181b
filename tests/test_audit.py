"""Audits: the numbers of `evaluate` and of sae-lens on the same rows and tokens, for dictionaries of anybody."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS, shifted
from sae_lens.evals import get_recons_loss
from sae_lens.training.activation_scaler import ActivationScaler
from support.auditing import HOOK, topk
from transformers import AutoTokenizer

from atom_lens import AtomicInnerProduct, evaluate, open_model
from atom_lens.activations.connect import wrap_backend
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.cli import main
from atom_lens.dictionaries.baselines.stock import stock_sae
from atom_lens.interventions.loss import spliced_losses
from atom_lens.recipe.running import document_side
from atom_lens.studies.audit.reading import _SPLIT
from atom_lens.studies.audit.result import Audit
from atom_lens.studies.audit.run import audit


def test_the_loss_is_that_of_sae_lens(tiny: str) -> None:
    """`ce_loss_score` and its parts, token by token, of texts of one length."""
    bridge, draw = open_model(tiny, device="cpu"), random.Random(1)
    bridge.enable_compatibility_mode(no_processing=True)
    texts = [" ".join(draw.choices(LETTERS[64:90], k=15)) for _ in range(6)]
    sae = topk()
    sae.cfg.metadata.hook_name = HOOK
    with torch.no_grad():
        sae.b_dec.mul_(0.01)
    found = spliced_losses(bridge, [Prompt(one) for one in texts], HOOK, {"topk": sae})["topk"]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokens = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer(one, add_special_tokens=False)["input_ids"]] for one in texts]
    )
    theirs = get_recons_loss(
        sae, bridge, ActivationScaler(), tokens, True, True, ignore_tokens=[tokenizer.bos_token_id]
    )
    each = {name: float(value.mean()) for name, value in theirs.items()}
    assert found.n == 6 * 15
    assert found.clean == pytest.approx(each["ce_loss_without_sae"], rel=1e-5)
    assert found.ablated == pytest.approx(each["ce_loss_with_ablation"], rel=1e-5)
    assert found.spliced == pytest.approx(each["ce_loss_with_sae"], rel=1e-5)
    assert found.kl == pytest.approx(each["kl_div_with_sae"], rel=1e-4)
    clean, ablated, spliced = (each[f"ce_loss_{name}"] for name in ("without_sae", "with_ablation", "with_sae"))
    assert found.recovered == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-4)


@pytest.mark.parametrize("library", ["bridge", "nnsight"])
def test_padding_and_libraries_change_nothing(tiny: str, library: str) -> None:
    """Texts of several lengths together are each by itself; what reconstructs exactly costs nothing."""
    model = open_model(tiny, "nnsight" if library == "nnsight" else "auto", device="cpu")
    texts = [Prompt(one) for one in ("a b", "c d e f g h", "i j k l m n o p q")]

    class Exact:
        W_dec = torch.eye(16)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return feature_acts

    both = {"topk": topk(), "exact": Exact()}
    found = spliced_losses(model, texts, HOOK, both)
    alone = [spliced_losses(model, [one], HOOK, both)["topk"] for one in texts]
    n = sum(one.n for one in alone)
    assert found["topk"].n == n == 2 + 6 + 9
    assert found["topk"].spliced == pytest.approx(sum(one.n * one.spliced for one in alone) / n, rel=1e-5)
    assert found["topk"].kl == pytest.approx(sum((one.n + 1) * one.kl for one in alone) / (n + 3), rel=1e-4)
    assert found["exact"].recovered == pytest.approx(1, abs=1e-5) and found["exact"].kl < 1e-8
    backend = wrap_backend(model)
    tokens = torch.tensor([[1, 3, 4]])
    before = backend.logits(tokens, torch.ones_like(tokens), 3)
    torch.testing.assert_close(backend.logits(tokens, torch.ones_like(tokens), 3), before, rtol=0, atol=0)


def test_given_activations_need_no_model(generator: torch.Generator) -> None:
    """The dictionary's numbers are those of `evaluate`, explained variance is numpy's, nulls are encoded alike."""
    x = shifted(3000, 16, generator)
    train, heldout = x[:2000], x[2000:]
    sae = topk()
    with torch.no_grad():
        sae.b_dec.copy_(train.mean(dim=0))
    found = audit(sae, train, heldout.numpy())
    (one,) = found.dictionaries
    assert "null: data points, pursuit" in str(found)
    best = one.nulls["data_euclidean"].figures.r2
    assert best > one.own.figures.r2 and f"under a Euclidean pursuit have R² {best:.3f}" in str(found)
    aip = AtomicInnerProduct.estimate(train)
    theirs = evaluate(sae, train, heldout, aip)
    assert theirs.heldout is not None
    assert one.own.figures == theirs.heldout.model_copy(update={"interval": None}) and one.train == theirs.train
    with torch.no_grad():
        rest = (heldout - sae.decode(sae.encode(heldout))).numpy()
    total = heldout.numpy() - heldout.numpy().mean(axis=0)
    assert one.own.figures.r2 == pytest.approx(1 - np.sum(rest**2) / np.sum(total**2), rel=1e-4)
    assert one.refit is not None and one.pursued is not None
    assert one.refit.figures.r2_aip > one.own.figures.r2_aip, "the least squares of the AIP norm"
    assert one.refit.figures.l0 == one.own.figures.l0
    for null in (*one.nulls.values(), one.pursued):
        assert null.figures.l0.mean == pytest.approx(3, rel=0.15) and null.loss is None
    assert list(one.nulls) == ["random", "data", "random_euclidean", "data_euclidean"]
    for name in ("random", "data"):
        aip_null, euclidean = (one.nulls[f"{name}{norm}"].figures for norm in ("", "_euclidean"))
        assert euclidean.r2 > aip_null.r2 and euclidean.r2_aip < aip_null.r2_aip, "each at its best in its own norm"
    assert found.model is found.hook is None and found.n == 2000 and found.n_heldout == 1000
    assert audit(sae, train, heldout).dictionaries == found.dictionaries, "the same nulls again"


def test_two_dictionaries_are_matched(generator: torch.Generator) -> None:
    x = shifted(1500, 16, generator)
    sae = topk()
    turned = topk()
    with torch.no_grad():
        for name, value in sae.named_parameters():
            turned.get_parameter(name).copy_(value.flip(-1 if name == "W_enc" else 0) if name != "b_dec" else value)
    found = audit([sae, turned], x[:1000], x[1000:], other=topk(seed=1))
    assert [one.name for one in found.dictionaries] == ["TopKSAE", "TopKSAE (2)", "TopKSAE (3)"]
    same, *others = found.agreement
    assert same.names == ["TopKSAE", "TopKSAE (2)"] and same.figures.pw_mcc == pytest.approx(1)
    assert len(others) == 2 and all(0.2 < one.figures.pw_mcc < 0.9 for one in others)


def test_from_the_command_line(
    stock: Path, text: Path, tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model and hook from the folder; half of the documents are held out, and the numbers are those of their rows."""
    code = main(
        ["audit", str(stock), "--text", str(text), "--tokens", "1500", "--device", "cpu", "--loss-tokens", "200",
         "--json", str(tmp_path / "audit.json")]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    for word in ("its own encoder", "null: data points, pursuit", "CE recovered", "d_sae 40", str(text)):
        assert word in out
    found = Audit.read(tmp_path / "audit.json")
    (one,) = found.dictionaries
    assert found.model == tiny and found.hook == HOOK and one.architecture == "topk"
    assert one.own.loss is not None and 200 <= one.own.loss.n < 240
    costly = [one.pursued, one.nulls["data"], one.nulls["data_euclidean"]]
    assert all(other and other.loss is not None and other.loss.clean == one.own.loss.clean for other in costly)

    from atom_lens import harvest

    lines = text.read_text().splitlines()
    held = [line for line in lines if document_side(_SPLIT, line) == "heldout"]
    rest = [line for line in lines if document_side(_SPLIT, line) == "train"]
    assert 150 < len(held) < 250 and len(held) + len(rest) == 400
    pieces = [" ".join(line.split()[at : at + 15]) for line in lines for at in range(0, len(line.split()), 15)]
    whole = harvest(tiny, pieces, HOOK, "all", device="cpu", unique=True, max_tokens=16)
    assert found.n + found.n_heldout < len(whole[HOOK])
    again = audit(str(stock), text=[*rest, *held], tokens=1500, device="cpu", loss_tokens=0)
    assert again.n_heldout == pytest.approx(found.n_heldout, rel=0.1)
    assert again.dictionaries[0].own.figures.r2 == pytest.approx(one.own.figures.r2, rel=0.1)


def test_a_loaded_model_gives_the_same(stock: Path, text: Path, tiny: str) -> None:
    named = audit(str(stock), text=text, tokens=1000, device="cpu", loss_tokens=0)
    loaded = audit(str(stock), text=text, tokens=1000, model=open_model(tiny, device="cpu"), loss_tokens=0)
    assert loaded.dictionaries[0].own.figures.r2 == pytest.approx(named.dictionaries[0].own.figures.r2, rel=1e-4)
    assert loaded.n_heldout == named.n_heldout


def test_what_no_pursuit_gets_through_is_left_out(generator: torch.Generator) -> None:
    x = shifted(800, 16, generator)
    dense = stock_sae("relu", 0.0, 16, 400, whitened=False, device="cpu", seed=0)
    found = audit(dense, x[:500], x[500:]).dictionaries[0]
    assert found.own.figures.l0.mean > 64 and found.pursued is None and not found.nulls
    assert found.why.startswith("Refit, pursuit and nulls are left out: the mean L0 is")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no atoms at 'nowhere'"),
        (["STOCK", "--text", "nowhere.txt"], "file 'nowhere.txt' does not exist"),
        (["STOCK", "--text", "EMPTY"], "no document is on the side heldout or train"),
        (["STOCK", "--text", "SHORT"], "give more text"),
        (["STOCK", "--model", "nowhere/no-model"], "model 'nowhere/no-model' is neither a local folder"),
        (["STOCK", "--hook", "blocks.2.hook_resid_post"], "it holds one dictionary, of 'blocks.1.hook_resid_post'"),
        (["STOCK", "--text", "a", "--dataset", "b"], "--text is 'a' and --dataset 'b', allowed is one of them"),
        (["STOCK", "--tokens", "1"], "tokens is 1 and loss_tokens 2048, allowed are at least 2 and 0"),
        (["WIDE", "--text", "TEXT"], "has width 24, the activations have 16"),
        (["BARE", "--text", "TEXT"], "does not say its hook: give hook="),
        (["STOCK", "OTHER", "--text", "TEXT"], "the dictionaries are for different hooks"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str],
    message: str,
    stock: Path,
    text: Path,
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would ask again and again
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("a b c\nd e f\ng h\ni j k\nl m")
    topk(d_in=24, model_name=tiny, hook_name=HOOK).save_model(tmp_path / "wide")
    topk().save_model(tmp_path / "bare")
    topk(model_name=tiny, hook_name="blocks.2.hook_resid_post").save_model(tmp_path / "other")
    names = {"STOCK": stock, "TEXT": text, "EMPTY": "empty.txt", "SHORT": "short.txt", "WIDE": "wide", "BARE": "bare"}
    names["OTHER"] = "other"
    given = [str(names.get(one, one)) for one in arguments]
    code = main(["audit", *given, "--device", "cpu", "--json", "audit.json"])
    said = capsys.readouterr().err.strip().split("\n")[-1]  # a progress bar may stand above it
    assert code == 2 and message in said
    assert not (tmp_path / "audit.json").exists()


def test_one_side_alone_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="x_heldout is None, an audit of given activations needs both"):
        audit(topk(), shifted(100, 16, generator))
    with pytest.raises(ValueError, match="a dictionary is of type int"):
        audit(3, shifted(100, 16, generator), shifted(100, 16, generator))
