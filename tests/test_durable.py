"""What is left when a process dies: whole runs, or runs that go on to the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crashing import FORKS, Saved, made_atoms, save_and_die, train_run
from support.learners import tsae_learner

from atom_lens import AtomicInnerProduct, load_atoms, train
from atom_lens.dictionaries import Learner, Setup, Trained, find_kind
from atom_lens.recipe.reading import check_recipe
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.storage.files import locked, sweep
from atom_lens.storage.sealed import manifest_of, verify
from atom_lens.studies.train.run import save_atoms
from atom_lens.training.checkpoint import Batches
from atom_lens.training.fit import fit_together

FORKS.set_forkserver_preload(["atom_lens.studies"])
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products wait for their threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Stopped(BaseException):
    """As SIGINT: nothing catches it."""


@pytest.fixture(scope="module")
def recipe(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run over two hooks with two seeds and its nulls, a checkpoint before every step."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    subjects = [a + b for a in "abcdefghij" for b in "abcdefgh"]
    path.write_text("\n".join(json.dumps({"template": "{} is a city in", "subject": s}) for s in subjects))
    training = {"steps": 12, "batch_size": 16, "device": "cpu", "seeds": 2, "checkpoint_minutes": 0}
    return {
        "name": "tiny",
        "model": {"name": tiny, "device": "cpu"},
        "prompts": {"source": "jsonl", "path": str(path)},
        "hooks": HOOKS,
        "atoms": {"capacity": 32, "target_l0": 2.0},
        "training": training,
    }


def weights_of(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*.safetensors")}


def learners(x: torch.Tensor, aip: AtomicInnerProduct, units: list[str]) -> dict[str, Learner]:
    atoms = Atoms(capacity=24, target_l0=2.0)
    made = {unit: find_kind(unit, Trained).start(Setup(x, aip, atoms), 2.0, 0) for unit in units}
    made["frozen"] = tsae_learner(x, aip, atoms, freeze_decoder=True)
    made["sparse"] = tsae_learner(x, aip, atoms.model_copy(update={"step": "sparse"}))
    return made


def test_resumed_training_is_bit_identical(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of learner and step, stopped at several steps in one training, across epochs, warm-up and decay."""
    x = torch.randn(100, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 2
    aip = AtomicInnerProduct.estimate(x)
    units = ["tsae_tied", "tsae_free", "relu_whitened", "topk", "batchtopk", "jumprelu_whitened"]
    training = Training(steps=40, batch_size=32, device="cpu", checkpoint_minutes=0, dead_after=3)
    whole = learners(x, aip, units)
    expected = fit_together({"x": x}, whole, training)

    real, stop_at, drawn = Batches.__next__, [3, 17, 18, 30, 39], 0

    def stopping(self: Batches) -> Any:
        nonlocal drawn
        drawn += 1
        if stop_at and self.checkpoints and self.checkpoints.trainer.n_training_steps == stop_at[0]:
            stop_at.pop(0)
            self.checkpoints.keep()
            raise Stopped
        return real(self)

    monkeypatch.setattr(Batches, "__next__", stopping)
    path = tmp_path / "checkpoint.safetensors"
    for _ in range(5):
        with pytest.raises(Stopped):
            fit_together({"x": x}, learners(x, aip, units), training, checkpoint=path)
    resumed = learners(x, aip, units)
    drawn = 0
    found = fit_together({"x": x}, resumed, training, checkpoint=path)
    assert drawn == 1, "the rest was one step, and no batch was drawn again to estimate a whitening"
    for name, learner in whole.items():
        assert torch.equal(found[name], expected[name]), name
        state = resumed[name].sae.state_dict()
        for key, value in learner.sae.state_dict().items():
            assert torch.equal(value, state[key]), f"{key} of {name}"


def test_checkpoints_that_do_not_fit(generator: torch.Generator, tmp_path: Path) -> None:
    x = torch.randn(100, 8, generator=generator)
    aip = AtomicInnerProduct.estimate(x)
    training = Training(steps=5, batch_size=32, device="cpu", checkpoint_minutes=0)
    path = tmp_path / "checkpoint.safetensors"
    fit_together({"x": x}, learners(x, aip, ["topk"]), training, checkpoint=path)
    with pytest.raises(ValueError, match="is of another training, its training differ: remove it"):
        fit_together({"x": x}, learners(x, aip, ["topk"]), training.model_copy(update={"lr": 0.5}), checkpoint=path)
    with pytest.raises(ValueError, match="is of another training, its learners differ"):
        fit_together({"x": x}, learners(x, aip, ["relu"]), training, checkpoint=path)
    with pytest.raises(ValueError, match="is of another training, its streams differ"):
        fit_together({"x": x + 1}, learners(x, aip, ["topk"]), training, checkpoint=path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint .* is damaged, remove it to start over"):
            fit_together({"x": x}, learners(x, aip, ["topk"]), training, checkpoint=path)


@pytest.mark.slow
def test_a_stopped_run_goes_on(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(check_recipe({**recipe, "name": "whole"}), out=tmp_path)
    real = Batches.__next__

    def stopping(self: Batches) -> Any:
        if (
            self.checkpoints
            and self.checkpoints.trainer.n_training_steps == 7
            and HOOKS[1] in str(self.checkpoints.path)
        ):
            raise Stopped
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Batches, "__next__", stopping)
        train(check_recipe(recipe), out=tmp_path)
    work = tmp_path / "tiny.unfinished"
    assert not (tmp_path / "tiny").exists() and (work / HOOKS[0]).is_dir() and not (work / HOOKS[1]).exists()
    with pytest.raises(ValueError, match=r"tiny.unfinished' holds a run of another recipe: choose another name="):
        train(check_recipe({**recipe, "massive_ratio": None}), out=tmp_path)
    with pytest.raises((FileNotFoundError, ValueError)):
        load_atoms(work, hook=HOOKS[1])
    resumed = train(check_recipe(recipe), out=tmp_path)
    assert not work.exists() and weights_of(resumed).keys() == weights_of(whole).keys()
    for name in weights_of(whole):
        if not name.endswith("aip.safetensors"):  # that one names its run
            assert weights_of(resumed)[name] == weights_of(whole)[name], name
    report = json.loads((resumed / HOOKS[1] / "report.json").read_text())
    measured = {"train_rows_per_second", "train_share_of_floor"}
    assert not measured & report["seconds"].keys(), "half of the time was another process'"
    whole_report = json.loads((whole / HOOKS[1] / "report.json").read_text())
    assert measured <= whole_report["seconds"].keys() and whole_report["seconds"]["train_share_of_floor"] > 0
    assert report["heldout"] == json.loads((whole / HOOKS[1] / "report.json").read_text())["heldout"]


def test_one_process_at_a_time(recipe: dict[str, Any], tmp_path: Path) -> None:
    with locked(tmp_path / "tiny"):
        other = FORKS.Process(target=train_run, args=(recipe, str(tmp_path), os.environ["ATOM_LENS_CACHE"]))
        other.start()
        other.join()
    assert other.exitcode == 1 and [p.name for p in tmp_path.iterdir()] == [".tiny.lock"]
    with locked(tmp_path / "tiny"), pytest.raises(ValueError, match="another process is using .*tiny': wait for it"):
        train(check_recipe(recipe), out=tmp_path)


def killed_after(seconds: float, target: Callable[..., None], *arguments: Any) -> bool:
    """Run `target` in a process of its own, kill -9 it after `seconds`; False if it was done before."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
    return process.exitcode != 0


STREAMED: dict[str, Any] = {
    "positions": "all",
    "stream": {"context_size": 8, "metric_tokens": 200, "heldout_tokens": 60, "buffer_size": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, STREAMED], ids=["prompts", "stream"])
def test_kill_9_at_random_moments(recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """15 kills, one after another in the same runs: each run folder is whole and right, or goes on and ends right."""
    recipe = {**recipe, **changes}
    draw = random.Random(0)
    cache = os.environ["ATOM_LENS_CACHE"]
    assert not killed_after(120, train_run, recipe, str(tmp_path / "first"), cache)
    start = time.monotonic()
    assert not killed_after(120, train_run, recipe, str(tmp_path / "reference"), cache)
    usual = time.monotonic() - start
    expected = weights_of(tmp_path / "reference" / "tiny")
    kills = finished = 0
    while kills < 15:
        out = tmp_path / f"killed{finished}"
        while not (out / "tiny").exists():
            kills += killed_after(draw.uniform(0, usual), train_run, recipe, str(out), cache)
            for folder in out.glob("tiny/*/"):
                verify(folder)
            for folder in out.glob("tiny.unfinished/[!.]*/"):
                load_atoms(folder)
        assert weights_of(out / "tiny") == expected, f"after {kills} kills"
        assert sorted(p.name for p in out.iterdir()) == [".tiny.lock", "tiny"], "something was left lying"
        for folder in (out / "tiny", *(out / "tiny" / hook for hook in HOOKS)):
            verify(folder)
        finished += 1
    print(f"{kills} kills, {finished} runs, {usual:.1f} s each")


def test_kill_9_at_every_step_of_saving(tmp_path: Path) -> None:
    """Into a new folder: all or nothing. Over an old one: the old, the new, or a seal that does not fit."""
    states: dict[str, set[str]] = {"new": set(), "old": set()}
    for kind, found in states.items():
        for at in range(1, 100):
            folder = tmp_path / f"{kind}{at}"
            if kind == "old":
                made_atoms(1).save_model(folder)
            process = FORKS.Process(target=save_and_die, args=(str(folder), 2, at))
            process.start()
            process.join()
            if not folder.exists():
                found.add("nothing")
            else:
                try:
                    loaded = load_atoms(folder)
                    seed = 1 + torch.equal(loaded.W_dec, made_atoms(2).W_dec)
                    assert torch.equal(loaded.W_dec, made_atoms(seed).W_dec)
                    found.add(f"atoms {seed}")
                except ValueError as error:
                    assert "were written" in str(error) or "not what was written" in str(error), error
                    found.add("refused")
                made_atoms(3).save_model(folder)
                assert torch.equal(load_atoms(folder).W_dec, made_atoms(3).W_dec)
                assert not list(folder.glob(".*")), "the next save sweeps"
            if process.exitcode == 0:
                break
        assert process.exitcode == 0 and at > 5, "saving never came to its end"
    assert states == {"new": {"nothing", "atoms 2"}, "old": {"atoms 1", "refused", "atoms 2"}}


def test_saved_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure while saving over atoms leaves them as they were; what could not be read back is not written."""
    made_atoms(1).save_model(tmp_path / "atoms")
    before = weights_of(tmp_path)
    for spoil, message in (
        (lambda atoms: setattr(atoms.cfg.metadata, "odd", float("nan")), "NaN is not JSON"),
        (lambda atoms: setattr(atoms.cfg.metadata, "model_from_pretrained_kwargs", {"a": 1}), "model_from_pretrained"),
        (lambda atoms: atoms.b_dec.data.fill_(float("nan")), "b_dec has NaN"),
    ):
        atoms = made_atoms(2)
        spoil(atoms)
        for folder in ("atoms", "new"):
            with pytest.raises(ValueError, match=message):
                atoms.save_model(tmp_path / folder)
        assert weights_of(tmp_path) == before and not (tmp_path / "new").exists()
        assert [p.name for p in tmp_path.rglob(".*")] == []
    verify(tmp_path / "atoms")
    # Over atoms with evidence: what was measured on the old ones is not vouched for any more.
    save_atoms(made_atoms(1), tmp_path / "run", Saved(seed=1), torch.zeros(6))
    made_atoms(2).save_model(tmp_path / "run")
    assert set(manifest_of(tmp_path / "run").files) == {"aip.safetensors", "cfg.json", "sae_weights.safetensors"}
    # Into a folder that is there, not in its place.
    (tmp_path / "here").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "here")
    Path("my notes.txt").write_text("mine")
    made_atoms(1).save_model(".")
    assert os.getcwd() == str(tmp_path / "here") and load_atoms(".").cfg.d_sae == 6
    assert (tmp_path / "here").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_activations_only(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts change under a path that stays; and a finished hook that was damaged is not sealed into a run."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(Path(recipe["prompts"]["path"]).read_text())
    recipe = {**recipe, "prompts": {"source": "jsonl", "path": str(prompts)}}
    real = Batches.__next__

    def stopping(self: Batches) -> Any:
        if self.checkpoints and HOOKS[1] in self.checkpoints.path.name:
            raise Stopped
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Batches, "__next__", stopping)
        train(check_recipe(recipe), out=tmp_path / "runs")
    work = tmp_path / "runs" / "tiny.unfinished"
    assert not list(work.glob("*checkpoint*")), "that of a finished hook is gone"
    whole = prompts.read_text()
    prompts.write_text("\n".join(whole.splitlines()[1:]))
    with pytest.raises(ValueError, match="has other activations, the prompts or the model changed"):
        train(check_recipe(recipe), out=tmp_path / "runs")
    prompts.write_text(whole)
    weights = work / HOOKS[0] / "sae_weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="it was truncated or replaced"):
        train(check_recipe(recipe), out=tmp_path / "runs")
    weights.write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    assert train(check_recipe(recipe), out=tmp_path / "runs").is_dir()
    (tmp_path / "linked" / "tiny").mkdir()
    assert load_atoms(train(check_recipe(recipe), out=tmp_path / "linked"), hook=HOOKS[0]).cfg.d_sae == 32


def test_only_leftovers_are_swept(tmp_path: Path) -> None:
    """Hidden files of the user stay, whatever folder a study or a run goes on in."""
    for name in (".git", ".atom-lens-x.1", "cells"):
        (tmp_path / name).mkdir()
    for name in (".gitignore", ".x.lock", ".atom-lens-y.2"):
        (tmp_path / name).write_text("")
    sweep(tmp_path, "x")
    assert {p.name for p in tmp_path.iterdir()} == {".git", "cells", ".gitignore", ".x.lock", ".atom-lens-y.2"}
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {".git", "cells", ".gitignore", ".x.lock"}
