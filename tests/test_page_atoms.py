"""What the atoms browser of a run shows, against brute force; and what is said where it cannot be shown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paging import page_recipe

from atom_lens import load_atoms, train
from atom_lens.evidence.measure import observe
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.studies.report.atoms import browse, neighbours, window_margin
from atom_lens.studies.report.browsers import Browser as AtomsBrowser
from atom_lens.studies.report.browsers import open_browsers
from atom_lens.studies.report.run import write_page
from atom_lens.studies.train.result import RunReport

HOOK = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.slow  # a run of three hooks


def test_columns_against_brute_force(paged_run: Path, paged: Path) -> None:
    atoms, seen = load_atoms(paged_run, hook=HOOK), corpus(load_recipe(paged_run / "recipe.yaml"), HOOK)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    found = browse(atoms, atoms.aip, seen, heldout)
    codes = atoms.encode(seen.x[:]).detach().numpy()
    held = seen.heldout.numpy()
    assert found["train"] == (codes[~held] != 0).sum(0).tolist()
    assert found["heldout"] == (codes[held] != 0).sum(0).tolist()
    bars = np.array(found["bars"]).reshape(-1, 16)
    assert bars.sum(1).tolist() == (codes != 0).sum(0).tolist()
    for i in range(codes.shape[1]):
        values = codes[codes[:, i] != 0, i]
        if not len(values):
            assert found["mean"][i] is None
            continue
        assert found["mean"][i] == pytest.approx(values.mean(), rel=1e-3)
        assert bars[i].tolist() == np.histogram(values, 16, (0, values.max()))[0].tolist()
    report = json.loads((paged_run / HOOK / "report.json").read_text())
    margin = window_margin(atoms, atoms.aip, heldout)
    assert int(margin.isnan().sum()) == report["heldout"]["dead_atoms"]
    assert float((margin[~margin.isnan()] > 0).double().mean()) == report["certificates"]["window"]["inside"]
    near, coherence = neighbours(atoms.W_dec.detach(), atoms.aip)
    cosine = atoms.aip.cosine(atoms.W_dec.detach(), atoms.W_dec.detach()).abs().fill_diagonal_(-1)
    assert torch.allclose(coherence, cosine.topk(5).values, atol=1e-6) and not (near == torch.arange(40)[:, None]).any()


def test_silent_atoms(paged_run: Path, paged: Path) -> None:
    """Atoms that never fire have no figures, and the page says so with dashes, not numbers."""
    atoms, seen = load_atoms(paged_run, hook=HOOK), corpus(load_recipe(paged_run / "recipe.yaml"), HOOK)
    atoms.threshold.data.fill_(1e9)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    found = browse(atoms, atoms.aip, seen, heldout)
    assert set(found["mean"]) == set(found["margin"]) == {None} and found["at"] == [0] * 41 and found["rows"] == {}


def test_identity_of_what_is_dead_on_train(paged_run: Path, paged: Path) -> None:
    """Nobody was matched to it: no figure, not the least."""
    atoms, seen = load_atoms(paged_run, hook=HOOK), corpus(load_recipe(paged_run / "recipe.yaml"), HOOK)
    atoms.threshold.data[:5] = 1e9
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    scores = torch.linspace(0.5, 0.9, 40)
    scores[:5] = 0
    found = browse(atoms, atoms.aip, seen, heldout, scores)
    dead = [count == 0 for count in found["train"]]
    assert all(dead[:5]) and not all(dead)
    assert [value is None for value in found["identity"]] == dead
    assert [value for value in found["identity"] if value is not None] == pytest.approx(
        [float(score) for score, none in zip(scores, dead, strict=True) if not none], rel=1e-3
    )


def test_what_is_missing_is_said(paged_run: Path, paged: Path, tmp_path: Path) -> None:
    """Without its prompts a run still has figures and nulls, and one sentence on the rest."""
    copy = tmp_path / "moved"
    shutil.copytree(paged_run, copy)
    text = (copy / "recipe.yaml").read_text().replace("prompts.jsonl", "gone.jsonl")
    (copy / "recipe.yaml").write_text(text)
    file = write_page([copy])
    assert file == tmp_path / "report.html"
    html = file.read_text(encoding="utf-8")
    assert "atoms are left out, file &#39;gone.jsonl&#39; does not exist." in html and 'id="browser"' not in html
    held = json.loads((paged_run / HOOK / "report.json").read_text())["heldout"]
    low, high = held["interval"]["r2"]
    assert f'<td class="held">{held["r2"]:.4f}<small>{low:.3f} to {high:.3f}</small></td>' in html


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:100], r"its report has \d+ training and \d+ held-out activations, here are"),
        (
            lambda lines: [line.replace("{} is a", "the {} is a") for line in lines],
            r"its report has held-out R² [-.\d]+,",
        ),
    ],
)
def test_prompts_that_were_edited_are_noticed(
    paged_run: Path, paged: Path, tmp_path: Path, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    """Another split would put wrong badges on contexts; the run's own figures stay."""
    copy = tmp_path / "moved"
    shutil.copytree(paged_run, copy)
    prompts = tmp_path / "edited.jsonl"
    prompts.write_text("\n".join(edit((paged / "prompts.jsonl").read_text().splitlines())))
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("prompts.jsonl", str(prompts)))
    found = list(open_browsers(copy, "moved", RunReport.read(copy / "report.json")))
    assert all(isinstance(one, str) and one.startswith("moved · blocks.") for one in found)
    said = " ".join(map(str, found))
    assert re.search(f"left out, the prompts or the model are not those of the run: {message}", said), said
    assert all(said.count(f"blocks.{layer}.hook_resid_post") == 1 for layer in range(3))
    html = write_page([copy]).read_text(encoding="utf-8")
    assert "are not those of the run" in html and 'id="browser"' not in html and "Results and nulls" in html


def test_one_hook_that_fails_leaves_the_others(paged_run: Path, paged: Path, tmp_path: Path) -> None:
    copy = tmp_path / "part"
    shutil.copytree(paged_run, copy)
    (copy / "blocks.0.hook_resid_post" / "sae_weights.safetensors").unlink()
    first, second, said = open_browsers(copy, "part", RunReport.read(copy / "report.json"))
    assert not isinstance(first, str) and first.label == f"part · {HOOK}"
    assert not isinstance(second, str) and second.label == "part · blocks.2.hook_resid_post"
    assert isinstance(said, str) and said.startswith("part · blocks.0.hook_resid_post: atoms are left out")


def test_words_that_fail_leave_the_rest(
    tiny: str, paged_run: Path, paged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in the logit lens; and no model is loaded for hooks that have no words."""

    def broken(_: object) -> None:
        raise RuntimeError("no unembedding\nhere")

    monkeypatch.setattr("atom_lens.studies.report.browsers.lens_of", broken)
    for opened in open_browsers(paged_run, "run", RunReport.read(paged_run / "report.json")):
        assert isinstance(opened, AtomsBrowser)
        assert opened.atoms["words"] == "Logit-lens words are left out: no unembedding here."
    once = {"steps": 2, "batch_size": 16, "device": "cpu", "nulls": False}
    heads = train(page_recipe(tiny, "heads", hooks=["blocks.1.attn.hook_z"], training=once), out=tmp_path)
    (opened,) = open_browsers(heads, "heads", RunReport.read(heads / "report.json"))
    assert not isinstance(opened, str) and "is not in the residual stream" in opened.atoms["words"]
