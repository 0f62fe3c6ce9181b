"""What pages are made of: a folder with prompts, one of them hostile, and a run of the tiny model there."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atom_lens import train
from atom_lens.recipe.reading import check_recipe
from atom_lens.recipe.recipe import Recipe

EVIL = "</script><img src=x onerror=pwned=1>"


@pytest.fixture(scope="module")
def paged(tiny: str, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 120 prompts, one of them hostile, that recipes are run in."""
    folder = tmp_path_factory.mktemp("page")
    draw = random.Random(0)
    subjects = sorted({"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(400)})[:120]
    rows = [{"template": "{} is a city in", "subject": s, "answer": draw.choice(["Frânce", "Italy"])} for s in subjects]
    rows[7] = {"template": f"{EVIL} {{}} is", "subject": "<img src=y>", "answer": EVIL}
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOM_LENS_CACHE", str(cache_folder))
        patch.chdir(folder)
        yield folder


def page_recipe(tiny: str, name: str, **changes: Any) -> Recipe:
    return check_recipe(
        {
            "name": name,
            "model": {"name": tiny, "device": "cpu"},
            "prompts": {"source": "jsonl", "path": "prompts.jsonl"},
            "hooks": ["blocks.*.hook_resid_post"],
            "atoms": {"capacity": 40, "target_l0": 3.0},
            "training": {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def paged_run(tiny: str, paged: Path) -> Path:
    """A run of three hooks from two seeds, with all nulls."""
    return train(page_recipe(tiny, "run"))


def top(codes: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The four rows of a split at which an atom is strongest."""
    rows = np.flatnonzero(side & (codes != 0))
    return rows[np.argsort(-codes[rows], kind="stable")][:4]
