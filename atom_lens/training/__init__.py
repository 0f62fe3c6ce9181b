"""Recipe to trained atoms."""

from atom_lens.training.fit import fit
from atom_lens.training.recipe import Recipe
from atom_lens.training.recipe_file import check_recipe, load_recipe
from atom_lens.training.run import train

__all__ = ["Recipe", "check_recipe", "fit", "load_recipe", "train"]
