"""The examples run, print what they claim, and draw."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.demo
def test_representation_shift(demo: str, tmp_path: Path) -> None:
    printed = run("01_representation_shift.py", "--cities", "200", "--out", str(tmp_path / "shift.png"))
    means = [float(mean) for mean in re.findall(r"mean angle +([\d.]+)", printed)]
    assert len(means) == 3 and max(means) < 75
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.demo
def test_aip_correction(demo: str, tmp_path: Path) -> None:
    out = ("--cities", "1200", "--paragraphs", "20", "--out", str(tmp_path / "aip.png"))
    euclidean, same, other = map(float, re.findall(r"mean angle +([\d.]+)", run("02_aip_correction.py", *out)))
    assert euclidean < 75 and abs(same - 90) < 0.5 and other > euclidean + 20
    assert (tmp_path / "aip.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.demo
def test_causal_edit(demo: str) -> None:
    """Nothing changes without an edit, the whole activation of Tokyo makes Paris Japanese, and atoms have names."""
    printed = run("03_causal_edit.py", "--cities", "900", "--steps", "100")
    answers = dict(re.findall(r"^  (.{40}) (.+)$", printed, flags=re.MULTILINE))
    said = {label.strip(): text for label, text in answers.items()}
    assert said["clean"].startswith("'") or said["clean"] == said["atoms in, no edit"]
    assert said["atoms in, no edit"].startswith("France")
    assert said["Tokyo's whole activation (the ceiling)"].startswith("Japan")
    assert len(re.findall(r"fires most on", printed)) == 5


@pytest.mark.slow
@pytest.mark.demo
def test_the_notebook_runs_top_to_bottom(demo: str, tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "03_causal_edit.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in notebook["cells"][3::2] if cell["cell_type"] == "code"), (
        "kept with its output"
    )
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(code).replace("CITIES, STEPS = 3000, 400", "CITIES, STEPS = 900, 60"))
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "clean again" in ended.stdout
