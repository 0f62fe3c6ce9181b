"""How time and memory grow: pairs of atoms, with the number of activations n, and with the capacity F.

    python benchmarks/scaling.py --json scaling.json --plot scaling.png

Pairs: `stability` against the bare tiled product of the same atoms, in turns. n: metric, 100 sparse steps, the figures
of the atoms and of a null on activations mapped from a file, each n in a process of its own, with the most memory that
the process itself held (anonymous pages: what is mapped from a file can be dropped at any time and does not count).
F: one sparse step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from atom_lens import AtomicInnerProduct, stability
from atom_lens.dictionaries import Setup
from atom_lens.dictionaries.nulls import Pursuit, data_atoms
from atom_lens.dictionaries.registry import finish
from atom_lens.dictionaries.tsae import kinds as tsae
from atom_lens.evidence.measure import observe
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.tensors.rows import Rows, mean_row, scratch
from atom_lens.training.faster import fuse
from atom_lens.training.fit import fit_together

WIDTH, BATCH = 640, 1024


class Held:
    """The most anonymous memory of this process while it is entered, in MB, and what it held at the start."""

    def __enter__(self) -> Held:
        self.before = self.most = self._now()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pairs(f: int, rounds: int) -> dict[str, Any]:
    """`stability` against the product of all tiles, which is the least that an exact answer needs."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(f, WIDTH, generator=generator), dim=1)
    l0 = torch.randint(1, 17, (20_000,), generator=generator)
    tile = 2048

    def bare() -> None:
        for i in range(0, f, tile):
            for j in range(i, f, tile):
                _ = atoms[i : i + tile] @ atoms[j : j + tile].T

    products, ours = [], []
    with Held() as held:
        for _ in range(rounds):
            products.append(seconds(bare))
            ours.append(seconds(lambda: stability(atoms, l0)))
    ratios = [one / other for one, other in zip(ours, products, strict=True)]
    return {
        "F": f,
        "product_s": products,
        "stability_s": ours,
        "ratio": statistics.median(ratios),
        "MB": held.most - held.before,
    }


def rows_of(n: int) -> Rows:
    """Activations around a common mean, with a spectrum, in a file."""
    x = scratch(n, WIDTH)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1.5, WIDTH)
    for start in range(0, n, 8192):
        part = x[start : start + 8192]
        part.copy_(torch.randn(part.shape, generator=generator) * scale + 0.5)
    return Rows(x)


def of_n(n: int) -> dict[str, Any]:
    """Time and memory of metric, training and figures at n activations."""
    x = rows_of(n)
    atoms = Atoms.model_validate({"capacity": 1280, "target_l0": 8})
    training = Training.model_validate({"steps": 100, "batch_size": BATCH, "device": "cpu"})
    took: dict[str, float] = {}
    with Held() as held:
        start = time.perf_counter()
        aip = AtomicInnerProduct.estimate(x)
        took["metric"] = time.perf_counter() - start
        learner = tsae.start(Setup(x, aip, atoms), atoms.target_l0, 0, atoms.encoder)
        took["start"] = time.perf_counter() - start - took["metric"]
        took["train"] = seconds(lambda: fit_together({"x": x}, {"tsae": learner}, training))
        trained = finish(learner, aip)
        took["measure"] = seconds(lambda: observe(trained, x, aip))
        data = data_atoms(x, trained.cfg.d_sae, mean_row(x).float(), torch.Generator().manual_seed(0))
        null = Pursuit(data, mean_row(x).float(), aip, 8)
        took["null"] = seconds(lambda: observe(null, x, aip))
    return {"n": n, "seconds": took, "MB": held.most, "file_MB": 4 * n * WIDTH / 1e6}


def of_f(f: int, rounds: int) -> dict[str, Any]:
    """Seconds of a sparse step at capacity F."""
    x = rows_of(20_000)
    aip = AtomicInnerProduct.estimate(x)
    atoms = Atoms.model_validate({"capacity": f, "target_l0": 8})
    learner = tsae.start(Setup(x, aip, atoms), atoms.target_l0, 0, atoms.encoder)
    settings = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-4,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, learner.sae, iter(()))
    fuse(trainer)
    batch = x[torch.arange(BATCH)]
    took = [seconds(lambda: trainer.step(batch)) for _ in range(rounds + 5)][5:]
    return {"F": f, "step_s": statistics.median(took), "quartiles_s": statistics.quantiles(took, n=4)[::2]}


def alone(kind: str, value: int, rounds: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, str(value), "--rounds", str(rounds)]
    # glibc keeps freed memory, up to 0.7 GB here, for later: told not to, it shows what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment if kind == "n" else None)
    if found.returncode:
        raise RuntimeError(found.stderr)
    result = json.loads(found.stdout.splitlines()[-1])
    print(kind, json.dumps(result), flush=True)
    return result


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    time_n, memory_n, time_f = figure.subplots(1, 3)
    n = [one["n"] / 1000 for one in found["n"]]
    for part, label in (("null", "a null, K = 8"), ("measure", "R², q*, L0"), ("metric", "metric")):
        time_n.plot(n, [one["seconds"][part] for one in found["n"]], "o-", label=label)
    time_n.set(xlabel="activations n, thousands", ylabel="seconds", title="Time, F = 1,280")
    memory_n.plot(n, [one["MB"] for one in found["n"]], "o-", label="memory of the process")
    memory_n.plot(n, [one["file_MB"] for one in found["n"]], "o--", color="C7", label="activations, in their file")
    memory_n.set(xlabel="activations n, thousands", ylabel="MB", title="Memory")
    f = [one["F"] / 1000 for one in found["F"]]
    time_f.plot(f, [1000 * one["step_s"] for one in found["F"]], "o-", label="a sparse step, batch 1,024")
    time_f.set(xlabel="capacity F, thousands", ylabel="milliseconds", title="Time of a step")
    for axes in (time_n, memory_n, time_f):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, nargs="*", default=[65_536], help="capacities for stability")
    parser.add_argument("--n", type=int, nargs="*", default=[20_000, 80_000, 160_000, 320_000])
    parser.add_argument("--f", type=int, nargs="*", default=[1280, 2560, 5120, 10_240, 20_480])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        kind, value = arguments.one[0], int(arguments.one[1])
        measures = {"pairs": lambda: pairs(value, arguments.rounds), "n": lambda: of_n(value)}
        print(json.dumps({**measures, "F": lambda: of_f(value, 5 * arguments.rounds)}[kind]()))
    else:
        wanted = {"pairs": arguments.pairs, "n": arguments.n, "F": arguments.f}
        results: dict[str, Any] = {
            kind: [alone(kind, value, arguments.rounds) for value in values] for kind, values in wanted.items()
        }
        results["about"] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        if arguments.plot:
            draw(results, arguments.plot)
