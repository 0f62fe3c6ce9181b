"""The registry of kinds: one entry says all that recipes, studies, tables and plots know of a kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shifted

from atom_lens import AtomicInnerProduct
from atom_lens.dictionaries import Fixed, Learner, Setup, Trained, find_kind, kind, kinds, register, registry
from atom_lens.dictionaries.baselines.bases import neurons
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.sections import Training
from atom_lens.recipe.split import SplitActivations
from atom_lens.studies.intervene import run as intervene
from atom_lens.studies.planted import run as planted
from atom_lens.studies.report.run import write_page
from atom_lens.tensors.rows import Rows


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Of every kind that is started, the level that it was started at; nothing is trained."""
    found: dict[str, float] = {}
    for one in kinds(Trained):

        def start(setup: Setup, level: float, seed: int, name: str = one.name, real: Any = one.start) -> Learner:
            found[name] = level
            return real(setup, level, seed)

        changed = type(one)(**{**one.__dict__, "start": start})
        monkeypatch.setitem(registry._KINDS, one.name, changed)
    yield found


@pytest.mark.slow
def test_l1_is_asked_of_what_has_an_l1(levels: dict[str, float], generator: torch.Generator, tmp_path: Path) -> None:
    """Gated SAEs were once handed their target L0 as the weight of their L1 in two of four studies."""
    training = Training(steps=1, batch_size=32, device="cpu")
    learning = planted.Learning.model_validate(
        {"planted": {"width": 8, "capacity": 16}, "atoms": {"capacity": 16, "target_l0": 2}, "n": 100, "l1": 7.0}
    )
    planted.learn(learning, training, 0, tmp_path / "cells")
    asked = {"relu": 7.0, "relu_whitened": 7.0, "gated": 7.0, "gated_whitened": 7.0}
    assert levels == {one.name: asked.get(one.name, 2.0) for one in kinds(Trained)}

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nmodel: {name: m}\nprompts: {source: cities}\nhooks: [h]\natoms: {capacity: 16, target_l0: 2}\n"
        "training: {steps: 1, device: cpu}\nintervene: {kinds: [gated, topk], l0: [3], l1: [7]}\n"
    )
    x = shifted(64, 8, generator)
    split = SplitActivations(Rows(x), Rows(x), [], [], [])
    made = intervene._dictionaries(load_recipe(path), "h", split, AtomicInnerProduct.estimate(x), {})
    assert list(made) == ["gated-7", "topk-3"]


def test_a_kind_of_ones_own(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One call makes it known to recipes, the comparison, its tables and the page."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    register(
        Fixed(name="mine", label="Mine, and no one else's", color="#ab34ef", make=lambda setup, _: neurons(setup.x))
    )
    units = {"kinds": ["mine", "topk"], "l0": [2]}
    code, out, err = run(f"compare={json.dumps(units)}", "name=own", command="compare")
    assert code == 0, err
    assert "Mine, and no one else's" in out
    page = write_page([Path("runs/own")]).read_text(encoding="utf-8")
    assert "Mine, and no one else&#39;s" in page and "#ab34ef" in page and "TopK" in page


def test_names() -> None:
    with pytest.raises(ValueError, match="name 'topk' is registered"):
        register(Fixed(name="topk", label="", make=lambda setup, _: neurons(setup.x)))
    with pytest.raises(ValueError, match="kind 'topkk' is unknown, did you mean topk"):
        find_kind("topkk")
    with pytest.raises(ValueError, match="kind 'null_data' is unknown, allowed are relu, gated"):
        find_kind("null_data", Trained)
    assert kind("some_features").label == "some_features" and kind("some_features").role == "baseline"
    assert (
        kind("gated").asked(5.0) == "L1 5"
        and kind("topk").asked(5.0) == "asked 5"
        and kind("neurons").asked(None) == ""
    )
