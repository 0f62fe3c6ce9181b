"""The examples run, print what they claim, and draw."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
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


def causal_edit(printed: str) -> bool:
    """Nothing changes without an edit, and the whole activation of Tokyo makes Paris Japanese."""
    said = {label.strip(): text for label, text in re.findall(r"^(.{40}) (.+)$", printed, flags=re.MULTILINE)}
    assert said["clean"] == said["atoms in, no edit"] == said["clean again"] and said["clean"].startswith("France")
    assert len(re.findall(r"^atom +\d+ ", printed, flags=re.MULTILINE)) == 5
    return said["Tokyo's whole activation"].startswith("Japan")


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.parametrize(
    ("name", "less", "holds"),
    [
        ("03_causal_edit", {"CITIES, STEPS = 3000, 400": "CITIES, STEPS = 900, 60"}, causal_edit),
        (
            "04_audit",
            {
                "PARAGRAPHS, STEPS, TOKENS, LOSS_TOKENS = 800, 600, 4096, 512": (
                    "PARAGRAPHS, STEPS, TOKENS, LOSS_TOKENS = 200, 20, 1500, 64"
                ),
                "blocks.9.": "blocks.1.",
                "d_sae=640": "d_sae=128",
            },
            lambda printed: "given activations" in printed,
        ),
        (
            "05_train_on_text",
            {
                "TOKENS, D_SAE, L0, AUDITED, LOSS_TOKENS = 100_000, 640, 8, 8192, 1024": (
                    "TOKENS, D_SAE, L0, AUDITED, LOSS_TOKENS = 22_000, 128, 4, 256, 64"
                ),
                "blocks.9.": "blocks.1.",
                "held_out[:300]": "held_out[:60]",
            },
            lambda printed: len(re.findall(r"CE recovered", printed)) == 2 and "atom" in printed,
        ),
    ],
)
def test_notebooks_run_top_to_bottom(
    name: str, less: dict[str, str], holds: Callable[[str], bool], demo: str, tmp_path: Path
) -> None:
    """With less to do, and earlier in the model, than the output that they are kept with."""
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any("text" in output or "data" in output for cell in cells for output in cell["outputs"]), "kept with output"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for shown, tried in less.items():
        assert shown in code
        code = code.replace(shown, tried)
    (tmp_path / "notebook.py").write_text(code)
    ended = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert holds(ended.stdout), ended.stdout
