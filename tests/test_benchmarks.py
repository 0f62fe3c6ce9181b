"""Benchmarks that need no model run: small ones, for what they time is for a quiet machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        (
            "training_step.py",
            "--sizes 32x64 --data planted --batch 64 --rounds 2 --warm-up 1",
            "TSAE, sparse, bfloat16",
        ),
        ("pursuit.py", "--sizes 32x64x64 --data planted --rounds 1 --k 4 --alphas 0", "pursue, threshold by atom"),
    ],
)
def test_it_runs(name: str, arguments: str, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / name, *arguments.split()], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert said in ended.stdout
