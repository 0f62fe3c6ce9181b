"""List the recipes that come with the package, or copy one to change it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from atom_lens.errors import AtomLensError
from atom_lens.recipe.shipped import find_recipe, shipped
from atom_lens.storage.files import replacing
from atom_lens.storage.terminal import say
from atom_lens.storage.text import lines_of, read_text


def command(action: Literal["list", "copy"] = "list", name: str | None = None, /, *, out: Path = Path()) -> None:
    """List the recipes that come with the package, or copy one to change it.

    Example: atom-lens recipes copy quickstart

    Args:
        action: what to do
        name: the recipe to copy
        out: folder to copy it to
    """
    if action == "list":
        say("\n".join(f"{called}\n    {about}" for called, about in map(_about, shipped().values())))
        return
    if name is None:
        raise AtomLensError(f"name is missing, allowed are {', '.join(shipped())}")
    if name not in shipped():
        raise AtomLensError(f"name is {name!r}, allowed are {', '.join(shipped())}")
    target = out / f"{name}.yaml"
    if target.exists():
        raise AtomLensError(f"{str(target)!r} exists already, choose another folder with --out")
    with replacing(target) as temporary:
        temporary.write_text(read_text(find_recipe(name)), encoding="utf-8")
    say(f"written to {target}")


def _about(file: Path) -> tuple[str, str]:
    """The first command and the first sentence of a recipe's header."""
    header = [line.removeprefix("#").strip() for line in lines_of(read_text(file)) if line.startswith("#")]
    called = next(line for line in header if line.startswith("atom-lens "))
    return called, " ".join(header[: header.index("")]).partition(". ")[0]
