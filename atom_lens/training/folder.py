"""Run folders: written by one process at a time, whole when they appear, continued where a process was killed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atom_lens._files import locked, new_folder, settle, sweep
from atom_lens._manifest import seal

logger = logging.getLogger(__name__)
_UNFINISHED = ".unfinished"
CHECKPOINT = ".checkpoint.safetensors"


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
        ValueError: another process works there, or what is there belongs to another recipe.
    """
    if path.name.endswith(_UNFINISHED):
        raise ValueError(f"name is {path.name!r}, names that end in {_UNFINISHED} are kept for runs that are not done")
    with locked(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"output folder {str(path)!r} is not empty: choose another name= or remove it")
        work = path.with_name(path.name + _UNFINISHED)
        sweep(path.parent, work.name)
        if work.exists():
            kept = work / "recipe.yaml"
            if not kept.is_file() or kept.read_text(encoding="utf-8") != recipe:
                raise ValueError(f"{str(work)!r} holds a run of another recipe: choose another name= or remove it")
            sweep(work)
            logger.info("going on with what is in %s", work)
        else:
            with new_folder(work) as temporary:
                (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
        try:
            yield work
            for checkpoint in work.glob(f"*{CHECKPOINT}"):
                checkpoint.unlink()
            seal(work)
            settle(work, path)
        finally:
            if work.exists() and not any(file.is_dir() or file.name.endswith(CHECKPOINT) for file in work.iterdir()):
                shutil.rmtree(work)
