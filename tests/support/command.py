"""A recipe on the tiny model, and the command line on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from atom_lens.cli import main


@pytest.fixture
def recipe(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe on the tiny model: 80 made-up subjects, 64 of them for training, atoms of width 16."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    subjects = {"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(100)}
    lines = [json.dumps({"template": "{} is a city in", "subject": s}) for s in sorted(subjects)[:80]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return {
        "name": "tiny",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": "prompts.jsonl"},
        "hooks": ["blocks.1.hook_resid_post"],
        "atoms": {"capacity": 32, "target_l0": 2.0},
        "training": {"steps": 20, "batch_size": 16, "device": "cpu"},
    }


@pytest.fixture
def run(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Write the recipe, with changes, and run a command on it."""

    def go(*arguments: str, command: str = "train", **changes: Any) -> tuple[int, str, str]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
        code = main([command, "recipe.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go
