"""What the processes do that tests kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atom_lens import TSAE, AtomicInnerProduct, TSAEConfig, train
from atom_lens.recipe.reading import check_recipe
from atom_lens.storage.schema import Result
from atom_lens.studies.train.run import save_atoms


class Saved(Result):
    """What stands for a report."""

    seed: int


def train_run(recipe: dict[str, Any], out: str, cache: str) -> None:
    os.environ["ATOM_LENS_CACHE"] = cache
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    train(check_recipe(recipe), out=out)


def made_atoms(seed: int) -> TSAE:
    generator = torch.Generator().manual_seed(seed)
    atoms = TSAE(TSAEConfig(d_in=4, d_sae=6))
    for parameter in atoms.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    atoms.aip = AtomicInnerProduct.estimate(torch.randn(40, 4, generator=generator), source="drawn")
    return atoms


def save_and_die(folder: str, seed: int, at: int) -> None:
    """Save atoms; be killed at the `at`-th time that something is synced or renamed."""
    calls = 0

    def killing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    os.fsync, os.rename, os.replace = killing(os.fsync), killing(os.rename), killing(os.replace)
    save_atoms(made_atoms(seed), Path(folder), Saved(seed=seed), torch.zeros(6))


# Forked from a server that has imported everything: a process costs milliseconds instead of seconds.
FORKS = multiprocessing.get_context("forkserver")
