"""Units side by side: every kind of unit, from the command line, resumed where it stopped."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shifted
from PIL import Image
from safetensors.torch import load_file

from atom_lens import AtomicInnerProduct, load_atoms
from atom_lens.cli import main
from atom_lens.dictionaries import Setup, Trained, find_kind, kinds
from atom_lens.evidence.results import L0, Coherence, Figures, MetricAbout
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.studies.compare.matched import matched
from atom_lens.studies.compare.result import Cell, Comparison, Hook, Run
from atom_lens.studies.compare.run import merit
from atom_lens.studies.compare.show import margins, show, verdict
from atom_lens.training.fit import fit_together

HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("unit", [kind.name for kind in kinds(Trained)])
def test_every_unit_trains_and_acts_on_raw_activations(unit: str, generator: torch.Generator) -> None:
    """What comes out encodes raw activations, and reconstructs better than before it learned."""
    x = shifted(600, 10, generator, shift=0.3)
    aip = AtomicInnerProduct.estimate(x)
    kind = find_kind(unit, Trained)
    learner = kind.start(Setup(x, aip, Atoms(capacity=24, target_l0=1.0)), 3.0, 3)
    fit_together({"x": x}, {unit: learner}, Training(steps=400, batch_size=64, lr=3e-3, device="cpu", dead_after=50))
    made = kind.finish(learner, aip)
    with torch.no_grad():
        codes = made.encode(x)
        error = (made.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert codes.shape == (600, 24) and float(error) < 0.9
    if unit.startswith("topk"):
        assert int((codes != 0).sum(1).max()) <= 3


def test_seeds_and_whitening_matter() -> None:
    x = shifted(300, 8, torch.Generator().manual_seed(0))
    aip = AtomicInnerProduct.estimate(x)
    setup = Setup(x, aip, Atoms(capacity=12, target_l0=2.0))
    topk, whitened = find_kind("topk", Trained), find_kind("topk_whitened", Trained)
    first, again, other = (topk.start(setup, 2.0, seed).sae.W_dec for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert whitened.start(setup, 2.0, 0).sae.cfg.normalize_activations == "covariance_whitening"


@pytest.mark.slow
def test_compare_from_the_command_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert run("name=features")[0] == 0
    compare = {
        "kinds": ["neurons", "principal", "topk_whitened", "relu", "tsae_tied", "tsae_free"],
        "l0": [2, 4],
        "l1": [1],
        "features": [{"name": "mine", "path": f"runs/features/{HOOK}"}],
    }
    training = {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 2}
    code, out, _ = run(command="compare", compare=compare, training=training)
    assert code == 0 and "TSAE, tied (ours)" in out and "null: data points" in out and "PW-MCC" in out
    folder = tmp_path / "runs" / "tiny"
    found = json.loads((folder / "compare.json").read_text())["hooks"][HOOK]
    by_kind = {(cell["kind"], cell["level"]): cell for cell in found["cells"]}
    assert {kind for kind, _ in by_kind} == {*compare["kinds"], "null_random", "null_data", "mine"}
    assert len(by_kind["tsae_free", 4]["runs"]) == 2 and by_kind["neurons", None]["identity"] is None
    assert by_kind["neurons", None]["runs"][0]["heldout"]["r2"] == pytest.approx(1)
    assert by_kind["principal", 16]["runs"][0]["heldout"]["q_star"] == 1.0
    for unit in ("tsae_tied", "topk_whitened"):
        same = by_kind[unit, 2]["identity"]
        assert same["runs"] == 2 and 0 < same["pw_mcc"] <= 1 and 0 < same["pw_mcc_start"] < 1
        low, high = by_kind[unit, 2]["runs"][0]["heldout"]["interval"]["r2"]
        assert low <= by_kind[unit, 2]["runs"][0]["heldout"]["r2"] <= high
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert len(rows) == 2 * sum(len(cell["runs"]) for cell in found["cells"])
    with Image.open(next(folder.glob("*.png"))) as image:
        assert image.width > 800
    # Resumed: what was measured is not measured again, what is missing is.
    kept = folder / "cells" / HOOK
    times = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    (kept / "tsae_free-4.json").unlink()
    (folder / "compare.json").unlink()
    assert run(command="compare", compare=compare, training=training)[0] == 0
    again = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert {name for name in times if times[name] != again[name]} == {"tsae_free-4.json"}
    redone = json.loads((folder / "compare.json").read_text())["hooks"][HOOK]
    assert [c["runs"] for c in redone["cells"]] == [c["runs"] for c in found["cells"]]
    code, _, error = run(command="compare", compare={**compare, "l0": [3]}, training=training)
    assert code == 2 and "holds a study of another recipe" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {"kinds": ["atoms"]}}, "key compare.kinds.0 is 'atoms', allowed is neurons, principal"),
        ({"compare": {"l0": []}}, "key compare.l0 is []"),
        ({"compare": {"features": [{"name": "x"}]}}, "features 'x' needs either path, or both release"),
        ({"compare": {"kinds": ["topk"], "features": [{"name": "x", "path": "no"}]}}, "no cfg.json in path 'no'"),
        (
            {"compare": {"features": [{"name": "../../../evil", "path": "no"}]}},
            "key compare.features.0.name is '../../../evil', allowed is String should match pattern",
        ),
        (
            {"compare": {"features": [{"name": "x", "path": "no"}] * 2}},
            "compare.features has 'x' 2 times, allowed is once",
        ),
        *(
            (
                {"compare": {"features": [{"name": name, "path": "no"}]}},
                f"features have name '{name}', allowed are names",
            )
            for name in ("topk", "neurons", "null_data")
        ),
        ({"compare": {"l0": [-3, 50]}}, "key compare.l0.0 is -3, allowed is greater than 0"),
        ({"compare": {"l0": [0]}}, "key compare.l0.0 is 0, allowed is greater than 0"),
        ({"compare": {"l1": [0]}}, "key compare.l1.0 is 0, allowed is greater than 0"),
        (
            {"compare": {"l0": [0.4], "kinds": ["topk_whitened"]}},
            "compare.l0 has 0.4, allowed is at least 1 for topk_whit",
        ),
        ({"compare": {"l0": [2, 50]}}, "compare.l0 has 50, allowed is up to atoms.capacity=32"),
        ({"atoms": None}, "key atoms is missing"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    code, _, error = run("--quiet", command="compare", **changes)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # before anything is read or trained


def cell(unit: str, level: float | None, q: float, r2: float, l0: float = 1.0) -> Cell:
    sparsity, coherence = L0(mean=l0, p50=1, p998=1, max=1), Coherence(p50=0, p998=0, max=0)
    split = Figures(n=9, q_star=q, r2=r2, r2_aip=0.0, l0=sparsity, empty_codes=0.0, dead_atoms=0, coherence=coherence)
    return Cell(kind=unit, level=level, runs=[Run(train=split, heldout=split)])


def at_hook(cells: list[Cell], **more: Any) -> Hook:
    metric = MetricAbout(n=9, ridge=0.0, condition=1.0)
    return Hook(n=9, n_heldout=9, d_in=2, d_sae=3, n_over_f=3.0, metric=metric, cells=cells, **more)


def shown(**hooks: Hook) -> str:
    return show_text(Comparison(model="m", hooks=hooks, versions={}))


def show_text(result: Comparison) -> str:
    return "\n".join(table.text() for part in show(result, "runs") for table in part.tables)


def test_margins_ask_for_both_figures() -> None:
    ours = [cell("tsae_free", 2, 0.9, 0.5), cell("tsae_free", 4, 0.7, 0.7), cell("tsae_tied", 2, 0.8, 0.55)]
    pretrained = cell("mine", None, 0.65, 0.8)
    baselines = [cell("topk", 2, 0.8, 0.65), cell("topk", 4, 0.7, 0.4), cell("topk", 1, 0.95, 0.1)]
    found = at_hook([*ours, *baselines, pretrained, cell("relu", 1, 0.3, 0.9), cell("neurons", 0, 0.6, 1.0)])
    margin = {(point.kind, point.level): point.margin for point in margins(found)}
    # Only a TSAE that is at least as stable counts; dense codes and controls are not in the race.
    assert set(margin) == {("topk", 1), ("topk", 2), ("topk", 4), ("mine", None)}
    assert margin["topk", 2] == pytest.approx(-0.1) and margin["topk", 4] == pytest.approx(0.3)
    assert margin["topk", 1] is None
    text = verdict(found)
    assert text.startswith("Of 4 baseline points with q* >= 0.5, 1 lie below")
    assert "TopK at 2 (q* 0.800, R² 0.650) is above by 0.100" in text
    assert "TopK at 1 (q* 0.950, R² 0.100) is more stable than any of ours" in text
    assert "mine (q* 0.650, R² 0.800) is above by 0.100" in text
    assert "TSAE, free (ours)" in shown(a=found)
    assert verdict(at_hook([*ours, cell("relu", 1, 0.3, 0.9)])).startswith("No baseline reached q* 0.5")
    assert "baseline" not in shown(a=at_hook(ours)), "there is none to say anything of"


def test_train_with_seeds_saves_identity(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    training = {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 3, "nulls": False}
    code, out, _ = run(training=training)
    assert code == 0 and "identity over 3 runs" in out and "before training" in out
    folder = tmp_path / "runs" / "tiny" / HOOK
    report = json.loads((folder / "report.json").read_text())
    assert set(report["nulls"]) == {"random", "data"} and len(report["identity"]["pairs"]) == 3
    scores = load_file(folder / "identity.safetensors")["identity"]
    assert scores.shape == (32,) and float(scores.max()) <= 1
    second = load_atoms(folder / "seed-2")
    assert not torch.equal(second.W_dec, load_atoms(tmp_path / "runs" / "tiny").W_dec)
    assert load_file(folder / "seed-2" / "identity.safetensors")["identity"].shape == (32,)
    assert main(["evaluate", "runs/tiny", "--quiet"]) == 0


def swept(unit: str, points: list[tuple[float, float]]) -> list[Cell]:
    """Cells of a sweep, as (L0, R²) on held-out activations."""
    return [cell(unit, l0, 0.5, r2, l0) for l0, r2 in points]


def test_matched_sparsity_interpolates_and_never_extrapolates() -> None:
    cells = [*swept("topk", [(4, 0.4), (16, 0.8)]), *swept("relu", [(10, 0.5), (90, 0.9)]), *swept("gated", [(7, 0.3)])]
    cells += swept("aip_pursuit", [(8.2, 0.7)])
    rows = {row.kind: row for row in matched(cells, 8.0)}
    assert rows["topk"].r2 == pytest.approx(0.6) and rows["topk"].between == [4, 16]
    assert rows["relu"].between is None and rows["gated"].between is None
    assert rows["aip_pursuit"].r2 == pytest.approx(0.7), "within 3% a point is the point"
    text = shown(a=at_hook(cells, matched=list(rows.values())))
    assert "at L0 8" in text and "No sweep crosses this L0: ReLU, gated." in text
    assert {row.kind: row for row in matched(cells, 16.0)}["topk"].r2 == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("kind", "points", "best"),
    [
        ("jumprelu", [(150, 0.9), (9, 0.5), (8.7, 0.6), (5, 0.7)], 2),  # the most explained of those near 8
        ("jumprelu", [(150, 0.9), (20, 0.8), (0, 0.0)], 1),  # none is near: the nearest
        ("relu", [(150, 0.9), (8, 0.5)], 0),  # its level is no L0
    ],
)
def test_a_rate_is_no_better_for_more_atoms(kind: str, points: list[tuple[float, float]], best: int) -> None:
    merits = [merit(find_kind(kind, Trained), 8.0, one.runs[0].heldout) for one in swept(kind, points)]
    assert merits.index(max(merits)) == best


@pytest.mark.slow
def test_a_rate_is_chosen_on_validation_rows(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    compare = {"kinds": ["topk_whitened"], "l0": [2], "lr": [1e-5, 1e-2]}
    training = {"steps": 40, "batch_size": 16, "device": "cpu"}
    changes = {"split": {"heldout": 0.25, "validation": 0.2}}
    assert run("--quiet", command="compare", compare=compare, training=training, **changes)[0] == 0
    cells = tmp_path / "runs" / "tiny" / "cells" / HOOK
    rate = json.loads((cells / "rates" / "topk_whitened.json").read_text())
    assert rate["lr"] == 1e-2 and rate["validation"]["0.01"] > rate["validation"]["1e-05"]
    assert rate["l0"] == {"1e-05": pytest.approx(2, abs=0.1), "0.01": pytest.approx(2, abs=0.1)}
    assert json.loads((cells / "topk_whitened-2.json").read_text())["lr"] == 1e-2


@pytest.mark.slow
def test_several_hooks_have_a_mean_and_a_curve(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The paper's table: means over layers; checked against the JSON by hand."""
    assert run("name=features", "--quiet")[0] == 0
    mine = [{"name": "mine", "path": f"runs/features/{HOOK}"}]
    compare = {"kinds": ["neurons", "tsae_free"], "l0": [2, 4], "matched": [3], "features": mine}
    code, out, err = run("hooks=[blocks.*.hook_resid_post]", command="compare", compare=compare)
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny"
    hooks = json.loads((folder / "compare.json").read_text())["hooks"]
    assert len(hooks) == 3 and all("matched" in found for found in hooks.values())
    cells = [
        one for found in hooks.values() for one in found["cells"] if (one["kind"], one["level"]) == ("null_data", 2)
    ]
    held = [one["runs"][0]["heldout"] for one in cells]
    line = next(line for line in out.split("mean over 3 hooks")[1].splitlines() if line.startswith("null: data points"))
    for key in ("r2", "q_star"):
        assert f"{sum(one[key] for one in held) / 3:.3f}" in line
    # Features are of one hook, and where a mean is not over all hooks it says so.
    at = {hook: [one["kind"] for one in found["cells"]].count("mine") for hook, found in hooks.items()}
    assert (
        at == {hook: int(hook == HOOK) for hook in hooks}
        and sum("mine (1 of 3 hooks)" in row for row in out.split("\n")) == 1
    )
    assert all([one["kind"] for one in found["cells"]].count("tsae_free") == 2 for found in hooks.values())
    code, _, err = run("--quiet", "hooks=[blocks.0.*.hook_z]", "name=other", command="compare", compare=compare)
    assert code == 2 and f"features 'mine' are for hook '{HOOK}', allowed are hooks blocks.0.*.hook_z" in err
    pictures = {path.name for path in folder.glob("*.png")}
    assert any("hook_resid_post,-asked-2" in name for name in pictures), pictures


@pytest.mark.slow
def test_hooks_of_different_widths(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Levels end at the width: units that are at one hook only have a point there, in the table and in the figure."""
    hooks = [HOOK, "blocks.1.mlp.hook_post"]
    compare = {"kinds": ["principal", "neurons"], "l0": [3, 20]}
    code, out, err = run(command="compare", hooks=hooks, compare=compare)
    assert code == 0, err
    found = json.loads((tmp_path / "runs" / "tiny" / "compare.json").read_text())["hooks"]
    levels = {
        hook: {
            unit: [one["level"] for one in found[hook]["cells"] if one["kind"] == unit]
            for unit in ("principal", "null_data")
        }
        for hook in hooks
    }
    assert levels[hooks[0]] == {"principal": [3, 16], "null_data": [3, 16]}
    assert levels[hooks[1]] == {"principal": [3, 20, 24], "null_data": [3, 20]}
    assert out.count("principal directions (1 of 2 hooks)") == 3
    table = show(Comparison.read(tmp_path / "runs" / "tiny" / "compare.json"), "tiny")[0].tables[0]
    assert [row.head for row in table.rows].count("principal directions (1 of 2 hooks)") == 3
    assert [row.head for row in table.rows].count("principal directions") == 1
