"""A run whose prompts have answers, and a judge's server on loopback that may fail."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from atom_lens import train
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.recipe.contexts import Corpus
from atom_lens.recipe.reading import check_recipe
from atom_lens.studies.judge.client import Budget, Judge
from atom_lens.studies.judge.kinds import CONTROL
from atom_lens.studies.judge.sampling import VERSION
from atom_lens.tensors.rows import Rows

KEY = "sk-a-key-that-must-not-be-kept"


COUNTRIES = ["Chad", "Fiji", "Mali", "Peru"]


SMALL: dict[str, Any] = {"latents": 4, "contexts": 2}


class Server:
    """chat_server.py in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.plan([])
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("chat_server.py"), folder])
        while not (folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}/v1"

    def plan(self, modes: list[str]) -> None:
        (self.folder / "plan.json").write_text(json.dumps(modes))

    @property
    def requests(self) -> list[dict[str, Any]]:
        file = self.folder / "requests.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server(tmp_path / "server")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="session")
def judging(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path, tiny: str) -> Path:
    """A run on the tiny model whose prompts have answers."""
    folder = tmp_path_factory.mktemp("judged")
    draw = random.Random(0)
    subjects = sorted({"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(200)})
    lines = [
        json.dumps({"template": "{} is a city in", "subject": s, "answer": draw.choice(COUNTRIES)}) for s in subjects
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    made = {
        "name": "tiny",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(folder / "prompts.jsonl")},
        "hooks": ["blocks.1.hook_resid_post"],
        "atoms": {"capacity": 24, "target_l0": 4.0},
        "training": {"steps": 30, "batch_size": 32, "device": "cpu"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOM_LENS_CACHE", str(cache_folder))
        return train(check_recipe(made), out=folder)


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Quadratic-weighted, by its formula."""
    apart = np.subtract.outer(a, b) ** 2
    return float(1 - np.diag(apart).mean() / apart.mean())


def ask(server: Server, cache: Path, question: str, budget: Budget | None = None) -> str:
    return Judge("m", server.url, cache, budget or Budget(1.0, (0.0, 0.0))).ask(VERSION, question, 50)


def rubrics(requests: list[dict[str, Any]]) -> list[str]:
    questions = [request["body"]["messages"][0]["content"] for request in requests]
    return [question for question in questions if '"score"' in question]


def planted_concepts() -> tuple[Corpus, dict[str, csc_array], np.ndarray]:
    """240 one-word prompts; a planted unit is active at the words of its letter, the control's anywhere."""
    draw = np.random.default_rng(0)
    words = [f"{'abcdef'[i % 6]}{i}" for i in range(240)]
    prompts = [Prompt.fill("we saw {} there", word) for word in words]
    heldout = draw.random(240) < 0.4
    places = torch.tensor([[i, *(p.span or ())] for i, p in enumerate(prompts)])
    made = Corpus(Rows(torch.zeros(240, 1)), prompts, places, torch.from_numpy(heldout))
    letters = np.stack([np.arange(240) % 6 == unit for unit in range(6)], axis=1)
    strength = draw.random((240, 6)) + 1
    codes = {"planted": letters * strength, CONTROL: draw.permuted(letters * strength, axis=0)}
    return made, {kind: csc_array(dense) for kind, dense in codes.items()}, heldout
