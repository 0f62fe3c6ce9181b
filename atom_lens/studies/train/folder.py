"""Run folders: written by one process at a time, whole when they appear, resumed where a process was killed."""

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
    """Where this process keeps the checkpoint of its dictionaries of a hook."""
    several = f".{parallel.rank()}-of-{parallel.size()}" if parallel.size() > 1 else ""
    return work / f"{hook}{several}{CHECKPOINT}"


@contextmanager
def run_folder(path: Path, recipe: str) -> Iterator[Path]:
    """Yield the folder to work in; it is sealed and becomes `path` at the end.

    Until then it is ``<path>.unfinished``. It stays there when the work is stopped, if a hook is done or a checkpoint
    exists, and the same recipe resumes from it.

    Args:
        path: of the run.
        recipe: as YAML: only the same one may resume.

    Raises:
        FileExistsError: `path` exists and is not empty.
        AtomLensError: another process is using it, or it belongs to another recipe.
    """
    work = path.resolve().with_name(path.resolve().name + _UNFINISHED)
    if parallel.rank() > 0:  # process 0 manages the folder
        parallel.together()
        yield work
        return
    if path.name.endswith(_UNFINISHED):
        raise AtomLensError(f"name is {path.name!r}, names that end in {_UNFINISHED} are reserved for unfinished runs")
    target = path.resolve()  # follow links
    with locked(target):
        check_new(path, "another name=")
        sweep(work.parent, work.name)
        if work.exists():
            kept = work / "recipe.yaml"
            if not kept.is_file() or read_text(kept) != recipe:
                raise AtomLensError(f"{str(work)!r} holds a run of another recipe: choose another name= or remove it")
            sweep(work)
            logger.info("resuming from %s", work)
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
    """A resumed run must have the activations it began with: prompts and models may change while keeping their names.

    Raises:
        AtomLensError: they are not the same.
    """
    if parallel.rank() > 0:
        return
    found = {hook: fingerprint(x) for hook, x in activations.items()}
    kept = work / _ACTIVATIONS
    if kept.exists() and read_json(kept) != found:
        raise AtomLensError(f"{str(work)!r} has other activations, the prompts or the model changed: remove it")
    write_json(kept, found)
