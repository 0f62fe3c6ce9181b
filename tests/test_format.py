"""The format: what any version wrote loads for ever, computes the same, and is written again byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atom_lens import load_atoms
from atom_lens.evidence.results import Report
from atom_lens.recipe.reading import load_recipe
from atom_lens.storage.sealed import FORMAT, MANIFEST, manifest_of, seal, verify
from atom_lens.studies.compare.run import Compare
from atom_lens.studies.train.show import reading, report_table

ARTIFACTS = Path(__file__).parent / "artifacts"
VERSIONS = sorted(path.name for path in ARTIFACTS.iterdir() if path.is_dir())
HOOK = "blocks.1.hook_resid_post"


def test_there_is_an_artifact_of_this_version() -> None:
    assert f"format-{FORMAT}" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_artifacts_compute_what_they_did(version: str, dtype: str, tmp_path: Path) -> None:
    folder = ARTIFACTS / version / ("run" if dtype == "float32" else dtype)
    atoms = load_atoms(folder)
    assert str(atoms.W_dec.dtype) == f"torch.{dtype}" and atoms.aip_eigenvectors.dtype == torch.float64
    outputs = load_file(ARTIFACTS / version / f"{dtype}.safetensors")
    codes = atoms.encode(outputs["x"].to(atoms.dtype))
    close = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}[dtype]  # another machine may add in another order
    assert torch.equal(codes > 0, outputs["codes"] > 0)
    torch.testing.assert_close(codes, outputs["codes"], rtol=close, atol=close)
    torch.testing.assert_close(atoms.decode(codes), outputs["x_hat"], rtol=close, atol=close)
    atoms.save_model(tmp_path / "again")
    source = folder / HOOK if (folder / HOOK).exists() else folder
    for name in ("cfg.json", "sae_weights.safetensors", "aip.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("version", VERSIONS)
def test_run_folders_of_every_version(version: str) -> None:
    run = ARTIFACTS / version / "run"
    for folder in (run, run / HOOK, run / HOOK / "seed-1"):
        verify(folder)
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.hooks == [HOOK] and recipe.section(Compare).kinds[:2] == ["neurons", "principal"]
    assert load_atoms(run, hook=f"{HOOK}").cfg.d_sae == 12
    report = Report.read(run / HOOK / "report.json")
    assert "held-out" in report_table(report).text() and reading(report)
    other = load_atoms(run / HOOK / "seed-1")
    assert not torch.equal(other.W_dec, load_atoms(run).W_dec)


def test_dtypes_make_exact_round_trips(tmp_path: Path) -> None:
    """Weights are rounded once, on the way to a smaller type; the metric never."""
    whole = load_atoms(ARTIFACTS / "format-1" / "run")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        atoms = load_atoms(ARTIFACTS / "format-1" / "run").to(dtype=dtype)
        atoms.save_model(tmp_path / str(dtype))
        back = load_atoms(tmp_path / str(dtype))
        for name, value in atoms.state_dict().items():
            assert torch.equal(value, back.state_dict()[name]) and value.dtype == back.state_dict()[name].dtype
        assert torch.equal(back.aip.eigenvectors, whole.aip.eigenvectors)
        assert torch.equal(back.aip.eigenvalues, whole.aip.eigenvalues)


def test_saved_on_a_gpu_loads_on_a_cpu(tmp_path: Path) -> None:
    """cfg.json keeps the device that the atoms were on; a machine without one is no obstacle."""
    shutil.copytree(ARTIFACTS / "format-1" / "bfloat16", tmp_path / "atoms")
    cfg = tmp_path / "atoms" / "cfg.json"
    cfg.write_text(cfg.read_text().replace('"device": "cpu"', '"device": "cuda:7"'))
    seal(tmp_path / "atoms", ["cfg.json", "sae_weights.safetensors", "aip.safetensors"])
    atoms = load_atoms(tmp_path / "atoms")
    assert atoms.W_dec.device.type == "cpu" and atoms.cfg.device == "cpu"
    assert atoms.aip_eigenvectors.device.type == "cpu"


def test_the_manifest_says_what_lies_there() -> None:
    folder = ARTIFACTS / "format-1" / "run" / HOOK
    there = {path.name for path in folder.iterdir() if path.is_file()} - {MANIFEST}
    assert set(manifest_of(folder).files) == there
    with pytest.raises(ValueError, match="does not list seed-1, so it cannot be trusted"):
        verify(folder, ["seed-1"])
