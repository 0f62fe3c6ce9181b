"""Run folders: written by one process at a time, whole when they appear, continued where a process was killed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import check_new, locked, new_folder, read_json, settle, sweep, write_json
from atom_lens.storage.sealed import seal
from atom_lens.storage.text import read_text
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows
from atom_lens.training.checkpoint import fingerprint

logger = logging.getLogger(__name__)
_UNFINISHED = ".unfinished"
_ACTIVATIONS = "activations.json"
CHECKPOINT = ".checkpoint.safetensors"


def checkpoint_file(work: Path, hook: str) -> Path:
    """Where this process keeps the training of its dictionaries of a hook."""
    several = f".{parallel.rank()}-of-{parallel.size()}" if parallel.size() > 1 else ""
    return work / f"{hook}{several}{CHECKPOINT}"


@contextmanager
def run_folder(path: Path, recipe: str) -> Iterator[Path]:
    """Yield the folder to work in; it is sealed and becomes `path` at the end.

    On the way it is ``<path>.unfinished``. There it stays when the work is stopped, if a hook is done or a checkpoint
    is kept, and the same recipe goes on from it.

    Args:
        path: of the run.
        recipe: as YAML: only the same one may go on.

    Raises:
        FileExistsError: `path` exists and is not empty.
        AtomLensError: another process works there, or what is there belongs to another recipe.
    """
    work = path.resolve().with_name(path.resolve().name + _UNFINISHED)
    if parallel.rank() > 0:  # process 0 looks after the folder
        parallel.together()
        yield work
        return
    if path.name.endswith(_UNFINISHED):
        raise AtomLensError(
            f"name is {path.name!r}, names that end in {_UNFINISHED} are kept for runs that are not done"
        )
    target = path.resolve()  # where a link leads, the run goes
    with locked(target):
        check_new(path, "another name=")
        sweep(work.parent, work.name)
        if work.exists():
            kept = work / "recipe.yaml"
            if not kept.is_file() or read_text(kept) != recipe:
                raise AtomLensError(f"{str(work)!r} holds a run of another recipe: choose another name= or remove it")
            sweep(work)
            logger.info("going on with what is in %s", work)
        else:
            with new_folder(work) as temporary:
                (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
        parallel.together()
        try:
            yield work
            (work / _ACTIVATIONS).unlink()
            seal(work, ["recipe.yaml", "report.json"])
            settle(work, target)
        finally:
            if work.exists() and not any(file.is_dir() or file.name.endswith(CHECKPOINT) for file in work.iterdir()):
                shutil.rmtree(work)


def same_activations(work: Path, activations: Mapping[str, Float[Tensor | Rows, "n _"]]) -> None:
    """Only the activations that a run began with may end it: prompts and models change under the names they have.

    Raises:
        AtomLensError: they are not the same.
    """
    if parallel.rank() > 0:
        return
    found = {hook: fingerprint(x) for hook, x in activations.items()}
    kept = work / _ACTIVATIONS
    if kept.exists() and read_json(kept) != found:
        raise AtomLensError(f"{str(work)!r} holds a run on other activations, prompts or model have changed: remove it")
    write_json(kept, found)
