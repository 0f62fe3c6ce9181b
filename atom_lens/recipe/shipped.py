"""The recipes that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from atom_lens.errors import AtomLensError
from atom_lens.storage.text import existing


def shipped() -> dict[str, Path]:
    """Name -> file."""
    here = Path(__file__).parent
    # A wheel has them next to this module, a checkout at its top.
    folder = next(one for one in (here / "shipped", here.parents[1] / "recipes") if one.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(given: str | Path) -> Path:
    """A file, or else the recipe of that name.

    Raises:
        AtomLensError: neither; the message names the nearest recipe.
        OSError: a path where nothing is.
    """
    name, known = str(given), shipped()
    if Path(given).is_file():
        return Path(given)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    if near:
        raise AtomLensError(f"recipe {name!r} does not exist, did you mean {near[0]}")
    if Path(name).suffix or len(Path(name).parts) > 1:
        return existing(given)
    raise AtomLensError(f"recipe {name!r} does not exist, the package has {', '.join(known)}")
