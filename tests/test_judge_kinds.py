"""The kinds of units that are judged, and their purity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from scipy.sparse import csc_array
from support.judging import SMALL

from atom_lens import load_atoms, publish
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries.baselines.bases import Basis, neurons
from atom_lens.evidence.codes import active_rows
from atom_lens.evidence.purity import purity
from atom_lens.recipe.contexts import Corpus, corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.storage.sealed import verify
from atom_lens.studies.evaluate import check_split
from atom_lens.studies.judge.kinds import CONTROL, NOT_ASKED, label_purity, read_kinds, strongest
from atom_lens.studies.judge.run import judge
from atom_lens.studies.judge.tables import judge_table
from atom_lens.tensors.rows import Rows


def test_no_subject_held_out_trained_the_atoms(judging: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the recipe they are measured on, and whichever seed they are of."""
    folder = tmp_path / "run" / "blocks.1.hook_resid_post" / "seed-1"
    folder.mkdir(parents=True)
    text = (judging / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    own = load_recipe(judging / "recipe.yaml")
    check_split(folder, own)
    # Half of the subjects that were held out then.
    check_split(folder, load_recipe(judging / "recipe.yaml", ["split.heldout=0.1"]))
    with pytest.raises(
        ValueError, match=r"[0-9]+ of 80 subjects held out now, such as .*, are subjects that these atoms"
    ):
        check_split(folder, load_recipe(judging / "recipe.yaml", ["split.heldout=0.4"]))
    # Other subjects in the same words are new to them, and where theirs are gone nobody knows.
    lines = [
        json.dumps({"template": "{} is a city in", "subject": f"{s}m"}) for s in ("kl", "la", "ab", "bc", "cd", "de")
    ]
    (tmp_path / "others.jsonl").write_text("\n".join(lines))
    others = [f"prompts.path={tmp_path / 'others.jsonl'}", "split.seed=7"]
    check_split(folder, load_recipe(judging / "recipe.yaml", others))
    assert not caplog.messages
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("prompts.jsonl", "gone.jsonl"))
    check_split(folder, own)
    assert "these atoms' own prompts cannot be read" in caplog.text


def test_without_a_judge_there_is_purity_and_the_run_stays_whole(judging: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "tiny"
    shutil.copytree(judging, run_folder)
    found = judge(run_folder)
    assert found["judge"] is None and json.loads((run_folder / "judge" / "judge.json").read_text()) == found
    assert [p.name for p in (run_folder / "judge").iterdir()] == ["judge.json"]
    assert found["purity"]["all"]["n"] > found["purity"]["heldout"]["n"] > 0
    text = judge_table(found)
    assert "purity, held-out rows: n = " in text and "no judge was asked" in text
    verify(run_folder)
    load_atoms(run_folder)
    assert not any("judge" in name for name in publish(run_folder, "user/tiny", dry_run=True).files)


def test_without_answers_there_is_no_purity(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--quiet")[0] == 0
    found = judge("runs/tiny")
    assert found["purity"] is None and "no purity" in judge_table(found)


def test_kinds_against_dense_codes(judging: Path) -> None:
    """Every kind's codes, from the activations by hand; and purity is that of these codes and the prompts' answers."""
    made = load_recipe(judging / "recipe.yaml")
    atoms = load_atoms(judging)
    read = corpus(made, "blocks.1.hook_resid_post")
    x, held = read.x[:], read.heldout.numpy()
    with torch.no_grad():
        codes = atoms.encode(x).numpy()
    often = [(codes[rows] > 0).sum(axis=0) for rows in (~held, held)]
    # At these rows atoms begin to count, and some do not: the median is of those that do.
    least = tuple(int(np.quantile(part, 0.4)) for part in often)
    per_unit = tuple(int(np.median(part[part >= enough])) for part, enough in zip(often, least, strict=True))
    assert per_unit != tuple(int(np.median(part)) for part in often)
    kinds = read_kinds(atoms, made, read, least, 0)
    np.testing.assert_allclose(kinds["atoms"].toarray(), codes, rtol=1e-6)
    for kind in ("neurons", "random directions", CONTROL, "atoms, as dense"):
        active = kinds[kind].toarray() != 0
        for rows, m in zip((~held, held), per_unit, strict=True):
            assert (active[rows].sum(axis=0) == m).all()
    dense = x.numpy()
    for rows, m in zip((np.flatnonzero(~held), np.flatnonzero(held)), per_unit, strict=True):
        for unit in range(dense.shape[1]):
            best = rows[np.argsort(-dense[rows, unit])[:m]]
            values = kinds["neurons"].toarray()[best, unit]
            np.testing.assert_allclose(values - values[0], dense[best, unit] - dense[best[0], unit], atol=1e-6)
    # Where an atom is active, its reading without a threshold is at its largest.
    by_row = kinds["atoms, as dense"].toarray()
    unit = int(np.argmax(often[0]))
    assert codes[np.flatnonzero(by_row[:, unit])].max(axis=0)[unit] == codes[:, unit].max()
    assert (kinds["data points"].data > 0).all()
    asked = read_kinds(atoms, made, read, least, 0, without=NOT_ASKED)
    assert list(asked) == [kind for kind in kinds if kind not in NOT_ASKED]

    found = label_purity(read, lambda labelled: read_kinds(atoms, made, labelled, least, 0), 0)
    assert found is not None
    labels = np.unique([str(read.prompt(row).answer) for row in range(len(read))], return_inverse=True)[1]
    rows = np.flatnonzero(held)
    assert found["all"]["kinds"]["atoms"] == purity(csc_array(codes), labels).figures
    assert found["heldout"]["kinds"]["atoms"] == purity(csc_array(codes[rows]), labels[rows]).figures


def test_units_that_know_subjects_know_no_labels() -> None:
    """Four rows of every subject, all or none active, and labels that units have nothing to do with."""
    draw = np.random.default_rng(0)
    subjects, units = 300, 400
    labels = draw.integers(0, 8, subjects)
    prompts = [Prompt(f"{s} {i}", str(s), answer=str(labels[s])) for s in range(subjects) for i in range(4)]
    heldout = torch.arange(subjects).repeat_interleave(4) % 2 == 0
    places = torch.tensor([[i, 0, 1] for i in range(len(prompts))])
    active = draw.random((subjects, units)) < 0.1

    def codes(read: Corpus) -> dict[str, csc_array]:
        subject = [int(str(read.prompt(row).subject)) for row in range(len(read))]
        return {"planted": csc_array(active[subject] * draw.random((len(subject), units)))}

    found = label_purity(Corpus(Rows(torch.zeros(len(prompts), 1)), prompts, places, heldout), codes, 0)
    assert found is not None and found["all"]["n"] == subjects and found["heldout"]["n"] == subjects // 2
    for split in found.values():
        for score in ("information", "purity"):
            assert split["kinds"]["planted"][score]["above_null"] < 0.1


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.integers(0, 1000))
def test_the_strongest_rows_against_sorting(n: int, d: int, batch: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    # Columns of either sign, and such that are always negative.
    x = (draw.normal(size=(n + 2, d)) - draw.choice([0, 10], d)).astype(np.float32)
    held = draw.permutation(np.arange(n + 2) % 3 == 0)
    basis: Basis = neurons(torch.from_numpy(x))
    codes = strongest(basis, Rows(torch.from_numpy(x)), torch.from_numpy(held), (3, 2), batch)
    found = codes.toarray()
    for unit in range(d):
        assert (np.diff(x[active_rows(codes, unit)[0], unit]) <= 0).all(), "the largest first"
    for rows, m in ((np.flatnonzero(~held), 3), (np.flatnonzero(held), 2)):
        for unit in range(d):
            best = set(rows[np.argsort(-x[rows, unit])[:m]].tolist())
            assert set(np.flatnonzero(found[:, unit])) & set(rows.tolist()) == best


def test_features_of_the_recipe_stand_beside(judging: Path, tmp_path: Path) -> None:
    """Another SAE on the same hook, and one that is too wide, which is one sentence."""
    folder = judging / "blocks.1.hook_resid_post"
    override = f"compare.features=[{{name: mine, path: {folder}}}]"
    found = judge(judging, overrides=[override], out=judging.parent / "with-features", dry_run=True, **SMALL)
    assert found["purity"]["all"]["kinds"]["features mine"] == found["purity"]["all"]["kinds"]["atoms"]
    assert found["judge"]["living"]["features mine"] == found["judge"]["living"]["atoms"]
    assert found["judge"]["estimate"]["questions"] == 2 * 5 * 4
    StandardSAE(StandardSAEConfig(d_in=5, d_sae=4)).save_model(tmp_path / "wide")
    with pytest.raises(ValueError, match="features 'wide' are 5 wide, the activations of blocks.1.hook_resid_post 16"):
        judge(judging, overrides=[f"compare.features=[{{name: wide, path: {tmp_path / 'wide'}}}]"], out=tmp_path / "o")
    elsewhere = SAEMetadata(hook_name="blocks.0.hook_resid_post")
    StandardSAE(StandardSAEConfig(d_in=16, d_sae=4, metadata=elsewhere)).save_model(tmp_path / "deep")
    with pytest.raises(
        ValueError, match="features 'deep' are of hook 'blocks.0.hook_resid_post', the atoms of 'blocks.1"
    ):
        judge(judging, overrides=[f"compare.features=[{{name: deep, path: {tmp_path / 'deep'}}}]"], out=tmp_path / "o")
