"""A run's atoms and activations, opened once for all that the page shows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from safetensors.torch import load_file

from atom_lens import load_atoms
from atom_lens.evidence import observe
from atom_lens.experiments.contexts import corpus
from atom_lens.page.atoms import browse
from atom_lens.page.folders import Folder
from atom_lens.page.geometry_charts import angles, coherences
from atom_lens.page.words import Lens, check_residual, columns, open_lens
from atom_lens.training.recipe import Recipe
from atom_lens.training.recipe_file import load_recipe
from atom_lens.training.run import IDENTITY_FILENAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What one hook of a run shows of its atoms: figures, and the browser's data."""

    label: str
    angles: go.Figure
    coherences: go.Figure | None
    atoms: dict[str, Any]


def open_hooks(folder: Folder) -> Iterator[Opened | str]:
    """Every hook of a run; or the sentence that says why its atoms or activations are not to be had here."""
    if not folder.reports:
        return
    try:
        recipe = load_recipe(folder.path / "recipe.yaml")
        lens = _lens(recipe)
        for hook in folder.reports:
            yield _open(folder, recipe, hook, lens)
    except (ValueError, OSError) as error:
        yield f"{folder.name}: angles, coherences and atoms are left out, {_sentence(error)}."


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _lens(recipe: Recipe) -> Lens | str:
    try:
        return open_lens(recipe.model)
    except (ValueError, OSError) as error:
        return f"Logit-lens words are left out: {_sentence(error)}."


def _open(folder: Folder, recipe: Recipe, hook: str, lens: Lens | str) -> Opened:
    logger.info("%s, %s: reading atoms and contexts", folder.name, hook)
    atoms = load_atoms(folder.path, hook=hook)
    seen = corpus(recipe, hook)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    identity = folder.path / hook / IDENTITY_FILENAME
    scores = load_file(identity)["identity"] if identity.is_file() else None
    data = browse(atoms, seen, heldout, scores)
    try:
        check_residual(hook)
        data["words"] = lens if isinstance(lens, str) else columns(lens, atoms.W_dec.detach())
    except ValueError as error:
        data["words"] = f"Logit-lens words are left out: {_sentence(error)}."
    seed = recipe.training.seed if recipe.training else 0
    return Opened(f"{folder.name} · {hook}", angles(seen, atoms.aip), coherences(heldout, atoms.aip, seed), data)
