"""Atoms of given activations in one call, whatever holds them, and recipes by name from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom_lens import Fitted, evaluate, fit, load_recipe
from atom_lens.cli import main
from atom_lens.recipe.reading import load_section
from atom_lens.recipe.shipped import shipped
from atom_lens.studies.planted.run import PlantedRecipe

SHORT: dict[str, Any] = {"d_sae": 32, "target_l0": 3.0, "steps": 10, "device": "cpu"}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """2,000 sums of three of 32 directions in 16 dimensions, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    codes = torch.zeros(2000, 32)
    codes.scatter_(1, torch.rand(2000, 32, generator=generator).topk(3).indices, 1.0)
    return codes @ atoms + 0.05 * torch.randn(2000, 16, generator=generator)


@pytest.fixture(scope="module")
def fitted(x: torch.Tensor) -> Fitted:
    return fit(x[:800], d_sae=32, target_l0=3.0, steps=120, device="cpu")


@pytest.fixture(scope="module")
def short(x: torch.Tensor) -> Fitted:
    return fit(x[:800], **SHORT)


def test_fit_finds_atoms_and_says_what_they_are_worth(x: torch.Tensor, fitted: Fitted) -> None:
    atoms, report = fitted
    assert report.heldout is not None and report.heldout.n == 160 and report.n == 576
    assert report.heldout.r2 > 0.6 and abs(report.heldout.l0.mean / 3 - 1) < 0.15
    assert set(report.nulls) == {"random", "data"} and "null: data points" in str(fitted)
    again = evaluate(atoms, x[800:1600], x[1600:])
    assert again.heldout is not None and abs(again.heldout.r2 - report.heldout.r2) < 0.1


@pytest.mark.parametrize("kept", ["numpy", "memory map", "bfloat16", "float64"])
def test_whatever_holds_the_rows(kept: str, x: torch.Tensor, short: Fitted, tmp_path: Path) -> None:
    x = x[:800]
    np.save(tmp_path / "x.npy", x.numpy())
    rows: Any = {
        "numpy": x.numpy(),
        "memory map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "bfloat16": x.bfloat16(),
        "float64": x.double(),
    }[kept]
    atoms, _ = fit(rows, **SHORT)
    assert atoms.W_dec.dtype == torch.float32
    if kept != "bfloat16":
        assert torch.equal(atoms.W_dec, short.atoms.W_dec)


def test_groups_are_held_out_whole(x: torch.Tensor) -> None:
    report = fit(x, groups=[i // 50 for i in range(2000)], steps=5, device="cpu").report
    assert report.heldout is not None and (report.heldout.n, report.n, report.d_sae) == (400, 1450, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_l0": 0.0}, "atoms: key target_l0 is 0.0, allowed is greater than 0"),
        ({"d_sae": 4, "target_l0": 5.0}, "atoms.target_l0 is 5.0, allowed is up to atoms.capacity=4"),
        ({"steps": 0}, "training: key steps is 0, allowed is greater than or equal to 1"),
        ({"encodr": "tied"}, "atoms: key encodr is unknown, did you mean encoder"),
        ({"groups": [1, 2]}, "groups"),
    ],
)
def test_what_is_not_allowed_is_said(options: dict[str, Any], message: str, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        fit(x, **options)


def test_recipes_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped():
        read = load_section(PlantedRecipe, name) if name == "planted" else load_recipe(name)
        assert read.name == name
    assert main(["recipes"]) == 0
    assert all(f"atom-lens {command} {name}" in capsys.readouterr().out for command, name in [("train", "quickstart")])
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert load_recipe("quickstart.yaml") == load_recipe("quickstart")
    Path("quickstart").write_text(Path("quickstart.yaml").read_text().replace("name: quickstart", "name: mine"))
    assert load_recipe("quickstart").name == "mine"  # a file goes before the recipe of that name
    assert main(["recipes", "copy", "quickstart"]) == 2 and main(["recipes", "copy", "quikstart"]) == 2
    error = capsys.readouterr().err
    assert "'quickstart.yaml' exists already" in error and "name is 'quikstart', allowed are" in error
    assert main(["train", "quikstart"]) == 2
    assert "recipe 'quikstart' does not exist, did you mean quickstart" in capsys.readouterr().err
    assert main(["train", "zzz"]) == 2
    assert "recipe 'zzz' does not exist, the package has activations, capacity," in capsys.readouterr().err
    assert main(["train", "nowhere/zzz.yaml"]) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    """Built, opened elsewhere, and run from an empty folder."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(Path(__file__).parent.parent),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "hatchling" in built.stderr:
        pytest.skip("hatchling cannot be fetched here")
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); from atom_lens.cli import main; main()"
    listed = subprocess.run(
        [sys.executable, "-I", "-c", script, "recipes"],
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in listed.stdout for name in shipped())
