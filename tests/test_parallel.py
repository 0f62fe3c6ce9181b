"""Several processes under torchrun: the same metric, atoms and evidence as one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from support.launching import launched

from atom_lens import AtomicInnerProduct
from atom_lens.evidence.stability import stability
from atom_lens.tensors import parallel


@pytest.fixture
def folder(tiny: str, tmp_path: Path) -> Path:
    draw = random.Random(0)
    subjects = sorted({"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(100)})[:80]
    lines = [json.dumps({"template": "{} is a city in", "subject": subject}) for subject in subjects]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    recipe = {
        "name": "tiny",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": "prompts.jsonl"},
        "hooks": ["blocks.*.hook_resid_post"],
        "atoms": {"capacity": 32, "target_l0": 2.0},
        "training": {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder: Path) -> None:
    for processes in (1, 2, 3):
        run = launched(processes, ["-m", "atom_lens", "train", "recipe.yaml", f"--out=runs-{processes}"], folder)
        assert run.returncode == 0, run.stderr
    runs = [folder / f"runs-{processes}" / "tiny" for processes in (1, 2, 3)]
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in runs]
    assert files[0] == files[1] == files[2] and len(files[0]) > 10
    for name in files[0]:
        if name.endswith(".safetensors"):
            one, *others = (load_file(run / name) for run in runs)
            for other in others:
                for key, value in one.items():
                    assert torch.equal(value, other[key]), f"{key} of {name}"
    reports = [json.loads((run / "report.json").read_text())["hooks"] for run in runs]
    for hook, one in reports[0].items():
        for other in reports[1:]:
            for part in ("train", "heldout", "nulls", "certificates", "metric", "identity"):
                assert one[part] == other[hook][part], (hook, part)


@pytest.mark.slow
def test_an_error_ends_all_processes(folder: Path) -> None:
    (folder / "runs" / "tiny" / "mine").mkdir(parents=True)
    run = launched(2, ["-m", "atom_lens", "train", "recipe.yaml"], folder)
    assert run.returncode != 0
    assert "is not empty: choose another name= or remove it" in run.stderr
    assert [p.name for p in (folder / "runs" / "tiny").iterdir()] == ["mine"]


SHARED = """
import sys, torch
from safetensors.torch import save_file
from atom_lens import AtomicInnerProduct
from atom_lens.tensors import parallel
from atom_lens.evidence.stability import stability
from atom_lens.evidence.certificates import atom_coherence
from atom_lens.geometry import angle_histogram
generator = torch.Generator().manual_seed(0)
x = torch.randn(20_000, 12, generator=generator) + 1
atoms = torch.randn(300, 12, generator=generator)
l0 = torch.randint(0, 6, (50,), generator=generator)
with parallel.processes():
    metric = AtomicInnerProduct.estimate(x)
    found = stability(atoms, l0, metric, tile=64)
    angles = angle_histogram(x[:3000], metric)
    result = [metric.eigenvalues, found.below, found.coherence_counts, torch.tensor(found.max_coherence)]
    result += [atom_coherence(atoms, metric, tile=64), angles.counts, torch.tensor(angles.mean)]
    if parallel.rank() == 0:
        save_file({str(i): one.reshape(-1) for i, one in enumerate(result)}, sys.argv[1])
"""


@pytest.mark.slow
def test_moments_and_pairs_are_the_same(tmp_path: Path) -> None:
    """Exact, but for the mean angle: moments are summed in the order of the rows, and pairs are counted."""
    (tmp_path / "script.py").write_text(SHARED)
    found = []
    for processes in (1, 2, 3):
        run = launched(processes, ["script.py", f"{processes}.safetensors"], tmp_path)
        assert run.returncode == 0, run.stderr
        found.append([one for _, one in sorted(load_file(tmp_path / f"{processes}.safetensors").items())])
    for other in found[1:]:
        for one, two in zip(found[0][:-1], other[:-1], strict=True):
            assert torch.equal(one, two)
        torch.testing.assert_close(found[0][-1], other[-1], rtol=1e-12, atol=0)


LOADED = """
import sys, torch
from atom_lens import harvest, open_model
from atom_lens.tensors import parallel
prompts = [" ".join(["a city"] * (1 + i % 7)) for i in range(60)]
model = open_model(sys.argv[1], device="cpu")
hook = "blocks.0.hook_resid_post"
alone = harvest(model, prompts, hook, "last", batch_tokens=32)[hook]
with parallel.processes():
    assert parallel.size() == 2
    assert torch.equal(harvest(model, prompts, hook, "last", batch_tokens=32)[hook], alone)
"""


@pytest.mark.slow
def test_a_loaded_model_is_read_by_each_process(tiny: str, tmp_path: Path) -> None:
    """What is not written to a common file cannot be shared out."""
    (tmp_path / "script.py").write_text(LOADED)
    run = launched(2, ["script.py", tiny], tmp_path)
    assert run.returncode == 0, run.stderr


def test_an_own_process_group_is_left_alone(tmp_path: Path, generator: torch.Generator) -> None:
    """A library that somebody calls in one of their processes only must not wait for the others."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert parallel.size() == 1 and parallel.rank() == 0
        metric = AtomicInnerProduct.estimate(torch.randn(50, 4, generator=generator))
        assert stability(torch.randn(9, 4, generator=generator), torch.tensor([1, 2]), metric).pairs == 36
    finally:
        dist.destroy_process_group()
