"""Causal evaluation of a recipe's atoms: do edits change the answers they should, and leave the rest alone?

The hook is chosen by the ceiling on training facts; everything reported is on facts about held-out subjects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from atom_lens._files import write_json
from atom_lens.activations import Prompt
from atom_lens.activations.backends import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import DTYPES, find_model
from atom_lens.evidence import observe
from atom_lens.evidence.report import versions
from atom_lens.experiments.cells import Cell, claim, kept, pretrained
from atom_lens.experiments.intervene_cells import cell, class_means, patched, swapped
from atom_lens.experiments.intervene_figures import draw
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.interventions.causal import Evaluation, Swaps, known, swaps
from atom_lens.sharing.load import load_atoms
from atom_lens.training.fit import fit_together
from atom_lens.training.recipe import Recipe
from atom_lens.training.run import SplitActivations, harvest_for, split_activations
from atom_lens.training.units import trained_unit, unit_learner

logger = logging.getLogger(__name__)


def intervene(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Evaluate the units of `recipe.intervene`; returns ``out/<name>`` with intervene.json and figures. Resumes.

    Raises:
        ValueError: no atoms or training in the recipe, prompts without answers, fewer than 10 facts that the model
            knows on either side of the split, positions that choose several tokens, or a folder of another recipe.
    """
    for section in ("atoms", "training"):
        if getattr(recipe, section) is None:
            raise ValueError(f"key {section} is missing in recipe {recipe.name!r}, intervene needs it")
    if recipe.positions not in ("subject_last", "last"):
        raise ValueError(f"positions is {recipe.positions!r}, intervene allows subject_last and last")
    prompts = recipe.prompts.read()
    if any(prompt.answer is None or prompt.subject is None for prompt in prompts):
        raise ValueError(f"prompts of recipe {recipe.name!r} lack a subject or an answer, intervene needs both")
    folder = Path(out) / recipe.name
    claim(folder, recipe)
    found = harvest_for(recipe, prompts)
    settings = recipe.model
    backend = open_backend(
        find_model(settings.name, settings.revision), settings.backend, DTYPES[settings.dtype], settings.device
    )
    splits = {hook: split_activations(recipe, prompts, found, hook) for hook in found}
    scan = kept(
        folder / "cells" / "scan.json",
        lambda: _scan(recipe, backend, prompts, splits),
        lambda cell: f"the ceiling is highest at {cell['hook']}",
    )
    hook, training = scan["hook"], recipe.training
    assert training is not None
    split, facts = splits[hook], [prompts[i] for i in scan["facts"]]
    pairs = swaps(backend, hook, facts, _generator(recipe), **_reading(recipe))
    labels = [str(prompts[i].answer) for i in split.prompts]
    means = kept(
        folder / "cells" / "class_means.json",
        lambda: class_means(backend, hook, pairs, split.x, labels, training.seed, **_reading(recipe)),
        lambda cell: f"flips {cell['flips']['mean']:.3f}",
    )
    cells = []
    for name, make in _units(recipe, hook, split):
        path = folder / "cells" / f"{name}.json"
        cells.append(
            {"name": name, **kept(path, lambda make=make: _cell(recipe, backend, hook, pairs, split, make()), _says)}
        )
    result = {
        "schema_version": 1,
        "name": recipe.name,
        "model": settings.name,
        "hook": hook,
        "n": len(split.x),
        "n_facts": len(facts),
        "n_answers": len({prompt.answer for prompt in facts}),
        "known": scan["known"],
        "scan": scan["hooks"],
        "class_means": means,
        "cells": cells,
        "versions": versions(),
    }
    write_json(folder / "intervene.json", result)
    draw(result, folder / "intervene.png")
    return folder


def _generator(recipe: Recipe) -> torch.Generator:
    assert recipe.training is not None
    return torch.Generator().manual_seed(recipe.training.seed)


def _reading(recipe: Recipe) -> dict[str, Any]:
    return {"positions": recipe.positions, "prepend_bos": recipe.prepend_bos}


def _known(recipe: Recipe, backend: Backend, prompts: Sequence[Prompt], rows: Sequence[int], wanted: int) -> list[int]:
    """The first `wanted` of `rows` whose answer the model knows."""
    found: list[int] = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        hits = known(backend, [prompts[i] for i in part], **_reading(recipe))
        found += [part[i] for i in hits]
        if len(found) >= wanted:
            break
    if len(found) < 10:
        raise ValueError(f"the model knows {len(found)} of {len(rows)} answers, intervene needs at least 10")
    return found[:wanted]


def _scan(
    recipe: Recipe, backend: Backend, prompts: Sequence[Prompt], splits: dict[str, SplitActivations]
) -> dict[str, Any]:
    """Facts of both sides, and the ceiling of every hook on training facts: whole activations swapped."""
    assert recipe.training is not None
    settings, seed = recipe.intervene, recipe.training.seed
    first = next(iter(splits.values()))
    train = _known(recipe, backend, prompts, sorted(set(first.prompts)), settings.scan)
    facts = _known(recipe, backend, prompts, sorted(set(first.heldout_prompts)), settings.facts)
    hooks = {}
    for hook in splits:
        pairs = swaps(backend, hook, [prompts[i] for i in train], _generator(recipe), **_reading(recipe))
        scores = patched(backend, hook, pairs, pairs.target, **_reading(recipe))
        hooks[hook] = swapped(scores, scores, seed)["flips"]
    best = max(hooks, key=lambda hook: hooks[hook]["mean"])
    return {"hook": best, "hooks": hooks, "facts": facts, "known": {"train": len(train), "heldout": len(facts)}}


def _units(recipe: Recipe, hook: str, split: SplitActivations) -> Iterator[tuple[str, Callable[[], SAE[Any]]]]:
    """(name, what gives the dictionary)."""
    settings = recipe.intervene
    for unit in settings.units:
        for level in settings.l1 if unit.startswith("relu") else settings.l0:
            yield f"{unit}-{level:g}", lambda unit=unit, level=level: _trained(recipe, unit, level, split)
    if settings.run is not None:
        yield Path(settings.run).name, lambda: load_atoms(str(settings.run), hook=hook)
    for features in settings.features:
        yield f"features_{features.name}", lambda features=features: pretrained(features, "auto")


def _trained(recipe: Recipe, unit: str, level: float, split: SplitActivations) -> SAE[Any]:
    assert recipe.atoms is not None and recipe.training is not None
    training = recipe.training
    aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge)
    learner = unit_learner(unit, level, split.x, aip, recipe.atoms, training.device, training.seed)
    fit_together({"x": split.x}, {unit: learner}, training)
    return trained_unit(learner, aip)


def _cell(recipe: Recipe, backend: Backend, hook: str, pairs: Swaps, split: SplitActivations, sae: SAE[Any]) -> Cell:
    assert recipe.training is not None
    seed = recipe.training.seed
    aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge)
    seen = observe(sae, split.heldout, aip).figures
    evaluation = Evaluation(backend, hook, sae.to(backend.device), pairs, seed=seed, **_reading(recipe))
    return {
        "heldout": {key: seen[key] for key in ("r2", "r2_aip", "q_star", "l0")},
        **cell(evaluation, recipe.intervene, recipe.other_text.read(), seed),
    }


def _says(cell: Cell) -> str:
    return f"flips {cell['swap']['swap']['flips']['mean']:.3f} of {cell['swap']['patch']['flips']['mean']:.3f}"
