"""The examples run, print what they claim, and draw."""

from __future__ import annotations

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


@pytest.mark.demo
def test_representation_shift(demo: str, tmp_path: Path) -> None:
    printed = run("01_representation_shift.py", "--cities", "200", "--out", str(tmp_path / "shift.png"))
    means = [float(mean) for mean in re.findall(r"mean angle +([\d.]+)", printed)]
    assert len(means) == 3 and max(means) < 75
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.demo
def test_aip_correction(demo: str, tmp_path: Path) -> None:
    out = ("--cities", "1200", "--paragraphs", "20", "--out", str(tmp_path / "aip.png"))
    euclidean, same, other = map(float, re.findall(r"mean angle +([\d.]+)", run("02_aip_correction.py", *out)))
    assert euclidean < 75 and abs(same - 90) < 0.5 and other > euclidean + 20
    assert (tmp_path / "aip.png").read_bytes().startswith(b"\x89PNG")
