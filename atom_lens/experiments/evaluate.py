"""Evaluate atoms on disk, or any sae-lens SAE, on the activations of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atom_lens.evidence import evaluate
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.sharing.load import atoms_folder, open_dictionary
from atom_lens.training.recipe import Recipe
from atom_lens.training.recipe_file import load_recipe
from atom_lens.training.run import harvest_for, split_activations
from atom_lens.tsae import TSAE


def recipe_beside(path: str | Path) -> Path:
    """The recipe.yaml of the run that atoms at `path` belong to."""
    for folder in (Path(path), Path(path).parent):
        if (folder / "recipe.yaml").is_file():
            return folder / "recipe.yaml"
    raise ValueError(f"no recipe.yaml in {str(path)!r} or above it: say whose activations with --recipe")


def evaluate_folder(
    path: str | Path, recipe: Recipe | str | Path, overrides: Sequence[str] = (), hook: str | None = None
) -> dict[str, Any]:
    """The report of the atoms, or of any sae-lens SAE, at `path`, on the activations of `recipe`.

    An SAE without a metric of its own is measured under the metric of the recipe's training split.

    Args:
        path: whatever `load_atoms` reads from, but for releases, of any architecture that sae-lens has.
        recipe: whose activations and split.
        overrides: ``section.key=value``, applied to a recipe that is read from a file.
        hook: which atoms of a run over several hooks.

    Raises:
        ValueError: the hook of the atoms is not among the recipe's, widths differ, or the recipe's split is not the one
            these atoms were trained with.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = atoms_folder(path, hook)
    check_split(folder, recipe)
    atoms = open_dictionary(folder)
    has_metric = isinstance(atoms, TSAE) and atoms.aip.n > 0
    hook = str(atoms.cfg.metadata.hook_name)
    prompts = recipe.prompts.read()
    found = harvest_for(recipe, prompts)
    if hook not in found:
        raise ValueError(f"the atoms' hook {hook!r} is not among the recipe's, allowed are {', '.join(found)}")
    x, heldout, subjects, *_ = split_activations(recipe, prompts, found, hook)
    metric = None if has_metric else AtomicInnerProduct.estimate(x, recipe.metric.ridge, "the recipe's training split")
    about = {
        "name": recipe.name,
        "model": recipe.model.name,
        "hook": hook,
        "positions": recipe.positions,
        "massive_rows_dropped": found.dropped[hook],
        "seconds": {"harvest": found.seconds},
    }
    seed = recipe.training.seed if recipe.training else 0
    return evaluate(atoms, x, heldout, metric, groups=subjects, seed=seed, about=about)


def check_split(folder: Path, recipe: Recipe) -> None:
    """Atoms that know their recipe are not measured on another split: its held-out subjects may have trained them."""
    try:
        own = load_recipe(recipe_beside(folder))
    except ValueError:
        return
    if own.prompts == recipe.prompts and own.split != recipe.split:
        raise ValueError(
            f"split is {recipe.split}, these atoms were trained with {own.split}: "
            "subjects held out now may be subjects they were trained on"
        )
