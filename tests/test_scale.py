"""The n x F grid: from the command line, in one process and two, resumed; and the law read off it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.launching import launched

from atom_lens.evidence.measure import observe
from atom_lens.evidence.results import Figures
from atom_lens.studies.scale import run as scale_run
from atom_lens.studies.scale.law import critical_capacity, growth, laws
from atom_lens.studies.scale.result import Cell, Run
from atom_lens.training.fit import fit_together

HOOK = "blocks.1.hook_resid_post"
GRID = {"capacities": [8, 64], "n": [32, 64], "levels": [0.5]}


def cell(n: int, capacity: int, r2: float, data: str = "activations", heldout: float = -0.2) -> Cell:
    """As scale.json has it, R² alone; two seeds whose mean is `r2`."""
    splits = [
        (Figures.model_construct(r2=r2 + off), Figures.model_construct(r2=heldout, r2_aip=heldout))
        for off in (-0.01, 0.01)
    ]
    runs = [Run.model_construct(train=train, heldout=held) for train, held in splits]
    return Cell.model_construct(n=n, capacity=capacity, data=data, runs=runs)


@settings(max_examples=25)
@given(st.floats(0.3, 1.5), st.floats(0.2, 4.0))
def test_a_planted_law_is_found(exponent: float, factor: float) -> None:
    """R² that rises through 0.9 at F = factor n^exponent, linear in log F: the line and its exponent come back."""
    sizes = (500, 1000, 2000, 4000)
    capacities = np.unique(np.geomspace(0.05, 20 * max(sizes) ** 1.5, 12).astype(int) + 1).tolist()
    cells = [cell(n, f, 0.9 + 0.1 * float(np.log(f / (factor * n**exponent)))) for n in sizes for f in capacities]
    train, heldout = laws(cells, [0.9])
    assert train["exponent"] == pytest.approx(exponent, abs=1e-6) and train["factor"] == pytest.approx(factor, rel=1e-4)
    low, high = train["exponent_interval"]
    assert low <= train["exponent"] <= high and high - low < 1e-4
    assert heldout["points"] == [] and heldout["exponent"] is None and heldout["of"] == 4


def test_the_interval_is_that_of_the_regression() -> None:
    """Against numpy's least squares with its covariance, on points that do not lie on a line."""
    sizes, critical = np.array([100, 200, 400, 800, 1600]), np.array([90.0, 250.0, 350.0, 900.0, 1400.0])
    cells = [cell(int(n), f, 0.0 if f < c else 1.0) for n, c in zip(sizes, critical, strict=True) for f in (1, 10**5)]
    for one, c in zip(cells, np.repeat(critical, 2), strict=True):  # crossing of 0.5 exactly at c
        share = np.log(c) / np.log(10**5)
        for each in one["runs"]:
            each.train.r2 = 0.5 - share if one.capacity == 1 else 0.5 + (1 - share)
    law = laws(cells, [0.5])[0]
    assert [point["capacity"] for point in law["points"]] == pytest.approx(critical)
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(critical), 1, cov=True)
    assert law["exponent"] == pytest.approx(slope)
    half = 3.182446 * float(np.sqrt(covariance[0, 0]))  # 97.5% of Student's t with 3 degrees of freedom
    assert law["exponent_interval"] == pytest.approx([slope - half, slope + half], rel=1e-5)


@settings(max_examples=25)
@given(st.floats(0.2, 0.9), st.floats(0.3, 1.2), st.floats(0.05, 0.5))
def test_a_planted_growth_is_found(limit: float, exponent: float, gain: float) -> None:
    """From numbers of activations above the capacity alone; below it they may be anything."""
    sizes = [2000, 4000, 8000, 16000, 32000]
    cells = [cell(500, 1000, 0.0, heldout=-3.0)]
    cells += [cell(n, 1000, 0.0, heldout=limit - gain * (n / 2000) ** -exponent) for n in sizes]
    found = growth(cells)[0]
    assert (found.key, found.capacity, found.n) == ("r2", 1000, sizes)
    assert found.limit == pytest.approx(limit, abs=1e-4) and found.exponent == pytest.approx(exponent, abs=1e-3)
    assert found.factor == pytest.approx(gain * 2000**exponent, rel=1e-2)
    assert growth(cells[:4])[0].limit is None, "three points are no fit"
    assert growth([cell(n, 1000, 0.0, heldout=limit) for n in sizes])[0].limit is None, "nothing grows"


def test_a_crossing_outside_the_grid_is_none() -> None:
    assert critical_capacity([cell(10, 4, 0.95), cell(10, 8, 0.99)], "train", 0.9) is None
    assert critical_capacity([cell(10, 4, 0.5), cell(10, 8, 0.6)], "train", 0.9) is None
    # A curve that falls below the level again has not crossed it yet.
    dip = [cell(10, 4, 0.95), cell(10, 8, 0.8), cell(10, 16, 1.0)]
    assert critical_capacity(dip, "train", 0.9) == pytest.approx(np.sqrt(8 * 16))


def test_grid_from_the_command_line(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: dict[int, dict[str, torch.Tensor]] = {}
    heldout: dict[str, torch.Tensor] = {}

    def watched_fit(data: dict[str, Any], *rest: Any) -> Any:
        rows = {name: torch.as_tensor(x[:]).clone() for name, x in data.items()}
        trained[len(rows["activations"])] = rows
        return fit_together(data, *rest)

    def watched_observe(dictionary: Any, x: Any, metric: Any) -> Any:
        if len(x) == 16:
            heldout[metric.source.split()[1]] = torch.as_tensor(x[:]).clone()
        return observe(dictionary, x, metric)

    monkeypatch.setattr(scale_run, "fit_together", watched_fit)
    monkeypatch.setattr(scale_run, "observe", watched_observe)
    training = {"steps": 30, "batch_size": 16, "device": "cpu", "seeds": 2}
    code, out, err = run(command="scale", scale=GRID, training=training)
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny"
    found = json.loads((folder / "scale.json").read_text())["hooks"][HOOK]
    by_cell = {(one["data"], one["n"], one["capacity"]): one for one in found["cells"]}
    assert set(by_cell) == {(data, n, f) for data in ("activations", "shuffled") for n in (32, 64) for f in (8, 64)}
    for one in by_cell.values():
        assert len(one["runs"]) == 2 and one["runs"][0]["train"]["n"] == one["n"]
        assert one["runs"][0]["heldout"]["n"] == 16
    # The null is of the same columns in another order, on both splits; smaller sets lie in larger ones.
    for real, shuffled in (*(tuple(rows.values()) for rows in trained.values()), tuple(heldout.values())):
        assert torch.equal(real.sort(dim=0).values, shuffled.sort(dim=0).values)
        assert (torch.cdist(shuffled.double(), real.double()).min(dim=1).values > 1e-3).all()
    assert list(trained[32]) == list(heldout) == ["activations", "shuffled"]
    assert torch.equal(trained[32]["activations"], trained[64]["activations"][:32])
    assert ": R² train" in out and "shuffled, R² held-out" in out and "a law needs three" in out
    with Image.open(next(folder.glob("*.png"))) as image:
        assert image.width > 800
    # Resumed: only the row that is missing is made again, to the same figures.
    kept = folder / "cells" / HOOK
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    (kept / "n-64.json").unlink()
    assert run(command="scale", scale=GRID, training=training)[0] == 0
    assert {path.name for path in kept.iterdir() if times[path.name] != path.stat().st_mtime_ns} == {"n-64.json"}
    again = json.loads((folder / "scale.json").read_text())["hooks"][HOOK]
    assert again["cells"] == found["cells"]
    code, _, error = run(command="scale", scale={**GRID, "n": [32, 65]}, training=training)
    assert code == 2 and "holds a study of another recipe" in error


@pytest.mark.slow
def test_two_processes_fill_the_same_grid(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = {"steps": 12, "batch_size": 16, "device": "cpu", "seeds": 2}
    assert run("--quiet", command="scale", scale=GRID, training=training)[0] == 0
    two = launched(2, ["-m", "atom_lens", "scale", "recipe.yaml", "name=two", "--quiet"], tmp_path)
    assert two.returncode == 0, two.stderr
    one, other = (
        json.loads((tmp_path / "runs" / name / "scale.json").read_text())["hooks"][HOOK] for name in ("tiny", "two")
    )
    for here, there in zip(one["cells"], other["cells"], strict=True):
        for first, second in zip(here["runs"], there["runs"], strict=True):
            assert first["train"]["q_star"] == second["train"]["q_star"]
            assert first["heldout"]["r2"] == pytest.approx(second["heldout"]["r2"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "key scale is missing in recipe 'tiny', scale needs it"),
        (
            {"scale": {**GRID, "n": [32, 650]}},
            "scale.n has 650, the training activations at blocks.1",
        ),
        ({"scale": {**GRID, "capacities": []}}, "key scale.capacities is []"),
        ({"scale": {**GRID, "capacities": [8, 1]}}, "scale.capacities has 1, allowed is at least atoms.target_l0=2"),
        ({"scale": {**GRID, "levels": [1.5]}}, "key scale.levels.0 is 1.5, allowed is less than 1"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., tuple[int, str, str]],
    changes: dict[str, Any],
    message: str,
) -> None:
    code, _, error = run("--quiet", command="scale", **changes)
    assert code == 2 and message in error and error.count("\n") == 1
