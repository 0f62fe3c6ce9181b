"""Evaluate atoms on disk, or any sae-lens SAE, on the activations of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE

from atom_lens.activations.prompts import unique_reads
from atom_lens.evidence import evaluate
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.sharing.load import atoms_folder, load_atoms
from atom_lens.training.recipe import Recipe, load_recipe
from atom_lens.training.run import harvest_for, split_activations
from atom_lens.tsae import AIP_FILENAME


def recipe_beside(path: str | Path) -> Path:
    """The recipe.yaml of the run that atoms at `path` belong to."""
    for folder in (Path(path), Path(path).parent):
        if (folder / "recipe.yaml").is_file():
            return folder / "recipe.yaml"
    raise ValueError(f"no recipe.yaml in {str(path)!r} or above it: say whose activations with --recipe")


def evaluate_folder(path: str | Path, recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The report of the atoms, or of any sae-lens SAE, at `path`, on the activations of `recipe`.

    An SAE without a metric of its own is measured under the metric of the recipe's training split.

    Raises:
        ValueError: the hook of the atoms is not among the recipe's, or widths differ.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = atoms_folder(path, recipe.hooks[0] if len(recipe.hooks) == 1 else None)
    has_metric = (folder / AIP_FILENAME).is_file()
    atoms = load_atoms(folder) if has_metric else SAE.load_from_disk(folder)
    named = atoms.cfg.metadata.hook_name
    prompts = unique_reads(recipe.prompts.read(), recipe.positions)
    found = harvest_for(recipe, prompts)
    hook = str(named) if named in found else next(iter(found))
    if named is not None and named not in found and len(found) > 1:
        raise ValueError(f"the atoms' hook {named!r} is not in the recipe, allowed are {', '.join(found)}")
    x, heldout = split_activations(recipe, prompts, found, hook)
    metric = None if has_metric else AtomicInnerProduct.estimate(x, recipe.metric.ridge, "the recipe's training split")
    about = {"name": recipe.name, "model": recipe.model.name, "hook": hook, "positions": recipe.positions}
    return evaluate(atoms, x, heldout, metric, about={**about, "seconds": {"harvest": found.seconds}})
