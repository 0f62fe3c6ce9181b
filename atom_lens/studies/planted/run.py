"""Run the study: a recipe in, planted.json out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from atom_lens.errors import AtomLensError
from atom_lens.recipe.reading import load_section
from atom_lens.recipe.recipe import Name
from atom_lens.recipe.sections import Training
from atom_lens.storage.schema import Section, Seed
from atom_lens.storage.versions import versions
from atom_lens.studies.cells import claimed
from atom_lens.studies.planted.garden import (
    Garden,
    Planted,
    check_planted,
    draw_codes,
    hardest_codes,
    plant,
    theorem_tsae,
    window,
    wrong_codes,
)
from atom_lens.studies.planted.learning import Learning, learn
from atom_lens.studies.planted.result import Level, PlantedFound, TheoremFound
from atom_lens.studies.planted.show import show
from atom_lens.studies.study import Study, recipe_command, register

study = register(Study(name="planted", result=PlantedFound, show=show))


class Theorem(Section):
    """How often the theorem is tested, and on what."""

    planted: Planted = Planted.model_validate({"width": 256, "capacity": 512})
    dictionaries: int = Field(20, ge=1)
    codes: int = Field(10_000, ge=1)
    noise: list[float] = Field([0.0, 1.0, 2.0, 4.0, 8.0])
    gap: list[float] = Field([1.0, 0.6, 0.3, 0.2, 0.1])


class PlantedRecipe(Section):
    """The study."""

    name: Name
    theorem: Theorem = Theorem.model_validate({})
    learning: dict[Name, Learning] = {}
    training: Training | None = None
    seed: Seed = 0


def load_planted(path: str | Path, overrides: Sequence[str] = ()) -> PlantedRecipe:
    """Read the study's recipe; errors are one sentence, as for any recipe."""
    return load_section(PlantedRecipe, path, overrides)


def _garden(theorem: Theorem, number: int, seed: int) -> Garden:
    return plant(theorem.planted, seed + 10 * number)


def check_windows(theorem: Theorem, seed: int) -> None:
    """Check that the theorem has codes to speak of: an AtomLensError says which gap opens the window."""
    for number in range(theorem.dictionaries):
        at = window(_garden(theorem, number, seed), theorem.planted)
        if at.lower >= at.upper:
            gap = theorem.planted.gap
            least = float(at.lower + gap - at.upper)
            raise AtomLensError(f"the window is empty: gap is {gap}, allowed is above eps (2K - 1) = {least:.3f}")


def check_theorem(theorem: Theorem, seed: int) -> TheoremFound:
    """Wrong codes inside the window and beyond each of its ends, over several dictionaries.

    Up to half of the codes are the hardest ones, so that some are certainly misread just outside the window.
    """
    planted = theorem.planted
    low = high = 0.0
    counts = {"inside, float64": 0, "inside, float32": 0, "1% below": 0, "1% above": 0, "gap closed": 0}
    for number in range(theorem.dictionaries):
        garden = _garden(theorem, number, seed)
        generator = torch.Generator().manual_seed(seed + number)
        at = window(garden, planted)
        low, high = float(at.lower), float(at.upper)
        hardest = hardest_codes(garden.units, planted.k, planted.gap, 1.0)[: theorem.codes // 2]
        n = theorem.codes - len(hardest)
        codes = torch.cat([hardest, draw_codes(n, len(garden.units), planted.k, planted.gap, 1.0, generator)])
        x = garden.activations(codes, 0.0, generator)
        middle = (low + high) / 2
        exact, single = theorem_tsae(garden), theorem_tsae(garden, torch.float32)
        counts["inside, float64"] += wrong_codes(exact, middle, x, codes)
        counts["inside, float32"] += wrong_codes(single, middle, x, codes)
        counts["1% below"] += wrong_codes(exact, 0.99 * low, x, codes)
        counts["1% above"] += wrong_codes(exact, 1.01 * high, x, codes)
        # With the smallest amplitudes just below the condition, no threshold is right for all codes.
        closed = 0.99 * (low + planted.gap - high)
        codes = hardest_codes(garden.units, planted.k, closed, 1.0)
        x = garden.activations(codes, 0.0, generator)
        taus = torch.linspace(0.5 * closed, 1.5 * low, 41).tolist()
        counts["gap closed"] += min(wrong_codes(exact, tau, x, codes) for tau in taus)
    return TheoremFound(dictionaries=theorem.dictionaries, codes=theorem.codes, window=[low, high], wrong=counts)


def decay(theorem: Theorem, seed: int) -> dict[str, list[Level]]:
    """Share of codes read exactly as noise grows and as the gap between amplitudes closes, tau in mid-window."""
    found: dict[str, list[Level]] = {"noise": [], "gap": []}
    for key, levels in (("noise", theorem.noise), ("gap", theorem.gap)):
        for level in levels:
            planted = theorem.planted.model_copy(update={key: level})
            garden = plant(planted, seed)
            generator = torch.Generator().manual_seed(seed)
            codes = draw_codes(theorem.codes, len(garden.units), planted.k, planted.gap, 1.0, generator)
            x = garden.activations(codes, planted.noise, generator)
            at = window(garden, planted)
            tau = float(at.lower + at.upper) / 2
            wrong = wrong_codes(theorem_tsae(garden), tau, x, codes)
            open_by = float(at.upper - at.lower)
            found[key].append(Level(level=level, window=open_by, tau=tau, exact=1 - wrong / len(codes)))
    return found


def planted(recipe: PlantedRecipe, out: str | Path = "runs") -> Path:
    """Test the theorem, its decay, and what trained SAEs find; returns ``out/<name>`` with planted.json and plots.

    Raises:
        AtomLensError: before any work, for anything that cannot be planted, drawn or trained, or if the folder holds a
            study of another recipe.
    """
    if recipe.learning and recipe.training is None:
        raise AtomLensError("key training is missing, learning needs it")
    if any(level < 0 for level in recipe.theorem.noise):
        raise AtomLensError(f"theorem.noise has {min(recipe.theorem.noise):g}, allowed is 0 or more")
    for level in recipe.theorem.gap:
        if not 0 < level <= 1:
            raise AtomLensError(f"theorem.gap has {level:g}, allowed is above 0 and up to 1")
    for part in (recipe.theorem, *recipe.learning.values()):
        check_planted(part.planted)
    check_windows(recipe.theorem, recipe.seed)
    folder = Path(out) / recipe.name
    with claimed(folder, recipe):
        theorem, falling = check_theorem(recipe.theorem, recipe.seed), decay(recipe.theorem, recipe.seed)
        learning = {}
        for name, setting in recipe.learning.items():
            assert recipe.training is not None
            learning[name] = learn(setting, recipe.training, recipe.seed, folder / "cells" / name)
        study.keep(PlantedFound(theorem=theorem, decay=falling, learning=learning, versions=versions()), folder)
    return folder


def _from_file(recipe: str, overrides: Sequence[str], out: Path) -> Path:
    return planted(load_planted(recipe, overrides), out)


command = recipe_command(study, _from_file, "atom-lens planted planted")
