"""Several processes under torchrun: the same metric, atoms and evidence as one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import LETTERS
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


@pytest.fixture
def streamed(folder: Path) -> Path:
    """The recipe on running text, with one dictionary only: the other processes have nothing to train."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    draw = random.Random(0)
    texts = [" ".join(draw.choices(LETTERS[64:90], k=draw.randint(1, 60))) for _ in range(150)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe |= {
        "prompts": {"source": "jsonl", "path": "text.jsonl"},
        "hooks": ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"],
        "positions": "all",
        "split": {"heldout": 0.2, "validation": 0.1},
        "stream": {"context_size": 16, "metric_tokens": 600, "heldout_tokens": 200, "buffer_size": 2560},
        "training": {"steps": 80, "batch_size": 32, "device": "cpu", "nulls": False, "checkpoint_minutes": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


READ = """
import sys
from atom_lens.activations import stream
whole, number = stream.read_activations, 0
def counted(backend, reads, hooks, **rest):
    passes, run = 0, backend.run
    def running(*given):
        nonlocal passes
        passes += 1
        return run(*given)
    backend.run = running
    try:
        return whole(backend, reads, hooks, **rest)
    finally:
        backend.run = run
        with open(f"passes-{sys.argv[1]}.txt", "a") as file:
            file.write(f"{passes} {sum(len(read.tokens) for read in reads)}\\n")
stream.read_activations = counted
from atom_lens.cli import main
sys.exit(main(["train", "recipe.yaml", f"--out={sys.argv[1]}"]))
"""


@pytest.mark.slow
def test_a_stream_is_read_together(streamed: Path) -> None:
    """Each process runs the model on its share of the contexts, and the weights are those of one process."""
    (streamed / "script.py").write_text(READ)
    for processes in (1, 2, 3):
        run = launched(processes, ["script.py", f"runs-{processes}"], streamed)
        assert run.returncode == 0, run.stderr
    runs = [streamed / f"runs-{processes}" / "tiny" for processes in (1, 2, 3)]
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"):
        one, *others = (load_file(run / name / "sae_weights.safetensors") for run in runs)
        for other in others:
            assert all(torch.equal(value, other[key]) for key, value in one.items())
    counts = [[line.split() for line in (streamed / f"passes-runs-{n}.txt").read_text().splitlines()] for n in (1, 2)]
    one, two = (sum(int(passes) for passes, _ in each) for each in counts)
    assert one < two <= one + 2 * len(counts[1]), "a forward pass is made by one of them (and one more looks ahead)"
    assert 2 * len(counts[0]) == len(counts[1])


@pytest.mark.slow
def test_a_stream_that_was_read_together_goes_on(streamed: Path) -> None:
    """Killed at some step, and begun again by as many processes: the weights are those of a run that was not."""
    whole = launched(2, ["-m", "atom_lens", "train", "recipe.yaml", "--out=whole"], streamed)
    assert whole.returncode == 0, whole.stderr
    stop = (
        "import os, sys\nfrom atom_lens.training import checkpoint\nkeep, steps = checkpoint.Checkpoints.keep, []\n"
        "def counted(self):\n    keep(self)\n    steps.append(1)\n    if len(steps) == 30:\n        os._exit(9)\n"
        "checkpoint.Checkpoints.keep = counted\nfrom atom_lens.cli import main\n"
        "sys.exit(main(['train', 'recipe.yaml', '--out=stopped']))\n"
    )
    (streamed / "stop.py").write_text(stop)
    assert launched(2, ["stop.py"], streamed).returncode != 0
    again = launched(2, ["-m", "atom_lens", "train", "recipe.yaml", "--out=stopped"], streamed)
    assert again.returncode == 0, again.stderr
    assert "resuming from step 30" in again.stderr
    for weights in (streamed / "whole" / "tiny").glob("*/sae_weights.safetensors"):
        one, other = load_file(weights), load_file(streamed / "stopped" / weights.relative_to(streamed / "whole"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


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
