"""Long studies resume where they were stopped: every cell is kept as soon as it is measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from atom_lens.errors import AtomLensError
from atom_lens.recipe.reading import dump_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.split import SplitActivations, harvest_for, prompts_of, split_activations
from atom_lens.storage.files import check_new, locked, new_folder, replacing, sweep
from atom_lens.storage.schema import Result, Section
from atom_lens.storage.text import read_text
from atom_lens.studies.train.folder import same_activations
from atom_lens.tensors import parallel

logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, recipe: Section) -> Iterator[None]:
    """Only the recipe that started a folder continues it, with one process (or torchrun's together) at a time."""
    if parallel.rank() > 0:  # process 0 manages the folder
        parallel.together()
        yield
        return
    with locked(folder):
        _claim(folder, recipe)
        parallel.together()
        yield


def _claim(folder: Path, recipe: Section) -> None:
    kept, text = folder / "recipe.yaml", dump_recipe(recipe)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not kept.is_file())):
        raise FileExistsError(f"output folder {str(folder)!r} is not empty: choose another name= or remove it")
    if kept.is_file() and read_text(kept) != text:
        raise AtomLensError(f"{str(folder)!r} holds a study of another recipe: choose another name= or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for cells in (folder / "cells", *(folder / "cells").glob("*/")):
        sweep(cells)
    with replacing(kept) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def result_folder(path: Path) -> Iterator[Path]:
    """The folder of a study that cannot be resumed: it is new and appears whole, and only one process writes it.

    Raises:
        FileExistsError: something else is at `path`.
    """
    check_new(path, "another name=")
    with locked(path.resolve()), new_folder(path) as work:
        yield work


class Kept(Result):
    """A measurement that is kept as soon as it is made."""

    seconds: float = 0.0


AnyKept = TypeVar("AnyKept", bound=Kept)


def kept(path: Path, kind: type[AnyKept], make: Callable[[], AnyKept], says: Callable[[AnyKept], str]) -> AnyKept:
    """The cell at `path`; if it does not exist yet it is made, and logged with what it `says`."""
    if parallel.agreed(path.is_file):
        return kind.read(path)
    start = time.monotonic()
    cell = make()
    cell = cell.model_copy(update={"seconds": time.monotonic() - start})
    if parallel.rank() > 0:
        return cell
    path.parent.mkdir(parents=True, exist_ok=True)
    cell.write(path)
    logger.info("%-24s %s, %.0f s", path.stem, says(cell), cell.seconds)
    return cell


def splits(recipe: Recipe, folder: Path) -> Iterator[tuple[str, SplitActivations]]:
    """Each hook with its activations of both splits; a resumed study must have the activations that it began with."""
    prompts = prompts_of(recipe)
    found = harvest_for(recipe, prompts)
    same_activations(folder, found.views)
    for hook in found:
        yield hook, split_activations(recipe, prompts, found, hook)
