"""The command line end to end on a tiny model, and one clear sentence for everything a user can get wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_tiny_model
from PIL import Image
from sae_lens import SAE
from safetensors.torch import load_file

from atom_lens import load_atoms, train
from atom_lens.cli import main
from atom_lens.recipe.reading import check_recipe, dump_recipe, load_recipe
from atom_lens.studies.planted.run import load_planted


def test_train_writes_a_run_folder(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run()
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("blocks.1.hook_resid_post", "log.txt", "manifest.json", "recipe.yaml", "report.json")
    ]
    assert sorted(p.name for p in (folder / "blocks.1.hook_resid_post").iterdir()) == [
        *("aip.safetensors", "cfg.json", "manifest.json", "report.json"),
        *("sae_weights.safetensors", "sparsity.safetensors"),
    ]
    report = json.loads((folder / "report.json").read_text())
    assert (report["n"], report["d_in"], report["d_sae"]) == (64, 16, 32)
    assert set(report["seconds"]) >= {"harvest", "metric", "train", "evaluate"}
    assert "held-out" in out and "null: data points" in out and "n / F = 2.00" in out
    assert load_recipe(folder / "recipe.yaml") == load_recipe(tmp_path / "recipe.yaml")
    atoms = load_atoms(folder)
    assert atoms.cfg.metadata.hook_name == "blocks.1.hook_resid_post" and atoms.cfg.metadata.prepend_bos
    assert "64 training and 16 held-out" in (folder / "log.txt").read_text()


def test_same_recipe_same_atoms(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(f"name={name}", "--quiet")[0] == 0
    assert run("name=other", "training.seed=1", "--quiet")[0] == 0
    weights = {
        name: load_file(tmp_path / "runs" / name / "blocks.1.hook_resid_post" / "sae_weights.safetensors")
        for name in ("first", "second", "other")
    }
    assert all(torch.equal(weights["first"][k], weights["second"][k]) for k in weights["first"])
    assert not torch.equal(weights["first"]["W_dec"], weights["other"]["W_dec"])


def test_several_hooks_share_one_harvest(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = run("hooks=[blocks.*.hook_resid_post]")
    assert code == 0 and out.count("n / F = 2.00") == 3
    folder = tmp_path / "runs" / "tiny"
    reports = json.loads((folder / "report.json").read_text())["hooks"]
    assert list(reports) == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    with pytest.raises(ValueError, match="holds atoms of 3 hooks, choose hook= of blocks.0.hook_resid_post"):
        load_atoms(folder)
    assert load_atoms(folder, hook="blocks.2.hook_resid_post").cfg.d_in == 16
    assert main(["evaluate", "runs/tiny", "--hook", "blocks.2.hook_resid_post", "--json", "two.json"]) == 0
    assert json.loads(Path("two.json").read_text())["train"] == reports["blocks.2.hook_resid_post"]["train"]
    assert main(["evaluate", "runs/tiny", "--hook", "blocks.2.hook_resid_post", "split.seed=3"]) == 2
    with pytest.raises(ValueError, match="hook 'blocks.9.hook_resid_post' is not in"):
        load_atoms(folder, hook="blocks.9.hook_resid_post")


def test_quiet_is_quiet(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("atoms.capacity=0")[0] == 2  # writes recipe.yaml
    command = [sys.executable, "-m", "atom_lens", "train", "recipe.yaml", "--quiet"]
    quiet = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (quiet.stdout, quiet.stderr) == ("", "")


def test_evaluate_repeats_the_report(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--quiet")[0] == 0
    assert main(["evaluate", "runs/tiny", "--json", "again.json"]) == 0
    assert "held-out" in capsys.readouterr().out
    first, again = (json.loads(Path(p).read_text()) for p in ("runs/tiny/report.json", "again.json"))
    for part in ("train", "heldout", "certificates", "metric", "angles"):
        assert first[part] == again[part]
    assert again["kind"] == first["kind"] == "tsae_free", "which its folder, a plain jumprelu, does not say"
    # Trained nulls are not trained again.
    assert set(first["nulls"]) == {"random", "data", "frozen", "shuffled"}
    assert again["nulls"] == {name: first["nulls"][name] for name in ("random", "data")}
    # Any sae-lens SAE will do: without a metric of its own it is measured under the recipe's.
    stripped = tmp_path / "any" / "stripped"
    stripped.parent.mkdir()
    (tmp_path / "runs" / "tiny" / "blocks.1.hook_resid_post").rename(stripped)
    plain = SAE.load_from_disk(stripped)
    plain.cfg.metadata.aip = None
    plain.save_model("any/plain")
    # Atoms that lost theirs are not such an SAE.
    (stripped / "aip.safetensors").unlink()
    assert main(["evaluate", "any/stripped", "--recipe", "recipe.yaml"]) == 2
    assert "aip.safetensors' does not exist" in capsys.readouterr().err
    assert main(["evaluate", "any/plain", "--recipe", "recipe.yaml", "--json", "plain.json"]) == 0
    bare = json.loads(Path("plain.json").read_text())
    assert bare["train"] == first["train"] and bare["kind"] is None, (
        "its architecture is jumprelu, its training was not"
    )
    narrow = yaml.safe_load(Path("recipe.yaml").read_text())
    Path("narrow.yaml").write_text(yaml.safe_dump({**narrow, "hooks": ["blocks.0.hook_resid_post"]}))
    assert main(["evaluate", "any/plain", "--recipe", "narrow.yaml"]) == 2
    assert "hook 'blocks.1.hook_resid_post' is not among the recipe's" in capsys.readouterr().err
    assert main(["evaluate", "any/plain"]) == 2
    assert "no recipe.yaml in 'any/plain' or above it" in capsys.readouterr().err


def test_shift(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("\n".join(f"the capital of {a} in {b}" for a in "pqrst" for b in "uvwxy"))
    code, out, err = run("--json", "shift.json", command="shift", other_text={"source": "text", "path": "other.txt"})
    assert code == 0, err
    found = json.loads(Path("shift.json").read_text())["hooks"]["blocks.1.hook_resid_post"]
    here = found["prompts"]
    assert here["n"] == 64 and abs(here["seen"]["mean"] - 90) < 5  # 1/d leaves 3.6 degrees at this width
    assert set(here["under"]) == set(found) == {"prompts", "other text"}
    assert "blocks.1.hook_resid_post other text" in out


def test_shift_between_domains(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Three domains: every metric on every domain; what stands under a domain's own metric is near 90 degrees."""
    domains = {
        name: {"prompts": {"source": name, "limit": 60}, "positions": "all"}
        for name in ("arithmetic", "sentiment", "python_docs")
    }
    code, out, err = run(command="shift", domains=domains)
    assert code == 0, err
    with Image.open(next(Path("runs/tiny").glob("*.png"))) as image:
        assert image.width > 300
    found = json.loads(Path("runs/tiny/shift.json").read_text())["hooks"]["blocks.1.hook_resid_post"]
    assert set(found) == set(domains)
    for name, one in found.items():
        assert set(one["under"]) == set(domains)
        assert abs(one["under"][name]["mean"] - 90) < 8
    assert "under sentiment" in out
    code, _, err = run("name=poems", command="shift", domains={"poems": {"prompts": {"source": "poems"}}})
    assert code == 2 and "key domains.poems.prompts.source is 'poems', allowed are cities, " in err
    # What is wrong with the last domain is said before the first is harvested.
    gone = {"prompts": {"source": "text", "path": "gone.txt"}}
    subjects = {"prompts": {"source": "sentiment", "limit": 60}, "positions": "span"}
    for name, wrong, message in (("gone", gone, "file 'gone.txt'"), ("second", subjects, "domain 'second': positions")):
        first = {"prompts": {"source": "arithmetic", "limit": 60}}
        code, _, err = run(
            "name=bad", command="shift", domains={"first": first, name: wrong}, model={"name": "no such model"}
        )
        assert code == 2 and message in err


def test_wandb_offline(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    code, _, err = run("--quiet", wandb={"mode": "offline"})
    assert code == 0, err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atoms": {"capacty": 4}}, "key atoms.capacty is unknown, did you mean capacity"),
        ({"modle": {}}, "key modle is unknown, did you mean model"),
        ({"atoms": {"capacity": "many", "target_l0": 2.0}}, "key atoms.capacity is 'many', allowed is a valid integer"),
        (
            {"atoms": {"capacity": 0, "target_l0": 2.0}},
            "key atoms.capacity is 0, allowed is greater than or equal to 1",
        ),
        ({"atoms": {"capacity": 4, "target_l0": 5.0}}, "atoms.target_l0 is 5.0, allowed is up to atoms.capacity=4"),
        ({"atoms": None}, "key atoms is missing in recipe 'tiny', train needs it"),
        ({"hooks": []}, "key hooks is []"),
        (
            {"hooks": ["blocks.1.hook_resid_pots"]},
            "hook 'blocks.1.hook_resid_pots' is not in this model, near are blocks.1.hook_resid_post",
        ),
        ({"hooks": ["blocks.9.hook_resid_post"]}, "asks for layer 9, the model has layers 0 to 2"),
        ({"prompts": {"source": "jsonl", "path": "gone.jsonl"}}, "file 'gone.jsonl' does not exist"),
        ({"prompts": {"source": "tape"}}, "key prompts.source is 'tape', allowed are cities"),
        ({"prompts": {"source": "jsonl", "path": "empty.jsonl"}}, "there are no prompts"),
        ({"prompts": {"source": "jsonl", "path": "mismatch.jsonl"}}, "subject 'Bonn' is not in the prompt 'Rome is'"),
        (
            {"prompts": {"source": "jsonl", "path": "prompts.jsonl", "limit": 10}},
            "has 8 training activations of width 16, the metric needs at least 16",
        ),
        ({"model": {"name": "broken"}}, "gave NaN or infinite activations"),
        ({"model": {"name": "nobody/nothing"}}, "model 'nobody/nothing' is neither a local folder"),
        ({"positions": "first"}, "key positions is 'first', allowed is 'subject_last', 'last', 'all' or 'span'"),
        ({"name": "../up"}, "key name is '../up'"),
        ({"split": {"heldout": 1.5}}, "key split.heldout is 1.5, allowed is less than 1"),
        ({"metric": {"ridge": -1.0}}, "key metric.ridge is -1.0"),
        (
            {"atoms": {"capacity": 4, "target_l0": 2.0, "noise": float("inf")}},
            "key atoms.noise is inf, allowed is",
        ),
        ({"split": {"heldout": 0.001}}, "split.heldout is 0.001, which holds out 1 of 80 activations"),
        ({"model": {"name": "tiny", "device": "gpu"}}, "device 'gpu' is not available"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "mismatch.jsonl").write_text('{"text": "Rome is", "subject": "Bonn"}')
    if changes.get("model", {}).get("name") == "tiny":
        save_tiny_model(tmp_path / "tiny")
    if changes.get("model", {}).get("name") == "broken":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "broken"))
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "broken")
    code, out, err = run(**changes)
    assert code == 2 and out == ""
    sentence = [line for line in err.splitlines() if line.startswith("atom-lens train: ")]
    assert len(sentence) == 1 and message in sentence[0], err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.rglob("runs/**/*")] in ([], [".tiny.lock"]), "something was half written"


def test_missing_recipe_and_bad_overrides(
    run: Callable[..., tuple[int, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "atom-lens train: file 'nowhere.yaml' does not exist\n"
    assert "reaches into 'name', which is not a section" in run("name.first=1")[2]
    assert "key training.stepz is unknown, did you mean steps" in run("training.stepz=1")[2]
    Path("broken.yaml").write_text("a: [1")
    assert main(["train", "broken.yaml"]) == 2
    assert "broken.yaml is not YAML" in capsys.readouterr().err
    assert main(["train", "recipe.yaml", "--outt", "x"]) == 2
    assert "Unknown option: --outt" in capsys.readouterr().err
    hooks = ["--hook", "blocks.0.hook_resid_post", "--hook", "blocks.1.hook_resid_post"]
    assert main(["evaluate", "runs/tiny", *hooks]) == 2
    assert "--hook specified multiple times" in capsys.readouterr().err


def test_output_folder_is_never_overwritten(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "mine").write_text("keep me")
    code, _, err = run()
    assert code == 2 and "output folder 'runs/tiny' is not empty" in err
    assert (tmp_path / "runs" / "tiny" / "mine").read_text() == "keep me"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 kB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_disk_space(run: Callable[..., tuple[int, str, str]], full_disk: Path) -> None:
    code, _, err = run("atoms.capacity=2000", "--out", str(full_disk))
    assert code == 2 and "no disk space is left to write" in err and "Traceback" not in err
    assert os.listdir(full_disk) == [".tiny.lock"]


def test_numbers_as_people_write_them(recipe: dict[str, Any]) -> None:
    """YAML 1.1 takes 1e-6 for text."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe) + "metric: {ridge: 1e-6}\n")
    assert load_recipe("recipe.yaml").metric.ridge == 1e-6
    assert load_recipe("recipe.yaml", ["metric.ridge=1E-3"]).metric.ridge == 1e-3
    assert check_recipe({**recipe, "metric": {"ridge": "oas"}}).metric.ridge == "oas"
    assert check_recipe({**recipe, "atoms": {"capacity": 8, "target_l0": 2}}).atoms.target_l0 == 2.0
    with pytest.raises(ValueError, match="metric.ridge is 'much'"):
        check_recipe({**recipe, "metric": {"ridge": "much"}})
    written = yaml.safe_load(dump_recipe(check_recipe(recipe)))
    assert check_recipe(written) == check_recipe(recipe)


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        read = load_planted if path.stem == "planted" else load_recipe
        assert read(path).name == path.stem


def test_counterfact_recipe_on_a_local_stand_in(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's recipe, word for word, with the data file and the model replaced by small local ones."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    rows = []
    for _ in range(60):
        subject = "".join(draw.choices("abcdefghijkl", k=4))
        rows.append({"prompt": f"The capital of {subject} is", "subject": f" {subject}", "target_true": " Rome"})
        rows.append({"prompt": f"{subject} is a city in", "subject": subject, "target_true": " Italy"})
    (tmp_path / "counterfact").mkdir()
    (tmp_path / "counterfact" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Path(__file__).parent.parent / "recipes" / "gemma-2-2b-counterfact.yaml"
    local = ["prompts.path=counterfact", f"model.name={tiny}", "model.dtype=float32", "model.device=cpu"]
    small = ["hooks=[blocks.1.hook_resid_post]", "atoms.capacity=64", "training.steps=10", "training.device=cpu"]
    assert main(["train", str(recipe), *local, *small]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "runs" / "gemma-2-2b-counterfact" / "report.json").read_text())
    # 60 subjects, two reads each; a fifth of the subjects, with both of their reads, is held out.
    assert report["n"] + report["heldout"]["n"] == 120 and report["heldout"]["n"] == 24


def test_train_from_python(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = train(check_recipe(recipe), out=tmp_path / "out")
    assert folder == tmp_path / "out" / "tiny"
    with pytest.raises(FileExistsError, match="is not empty"):
        train(check_recipe(recipe), out=tmp_path / "out")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """As in `atom-lens shift ... | head -1`."""
    script = """
import atom_lens.cli as cli
cli._COMMANDS["planted"] = lambda _: print("x" * 10**7)
raise SystemExit(cli.main(["planted", "recipe.yaml"]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert "roken pipe" not in process.stderr.read()
    assert process.returncode == 1
