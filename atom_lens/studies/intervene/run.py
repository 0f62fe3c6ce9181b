"""Causal evaluation of a recipe's atoms: do edits change the answers they should, and leave the rest alone?

The hook is chosen by the ceiling on training facts; everything reported is on facts about held-out subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.connect import open_backend
from atom_lens.activations.models import DTYPES, find_model
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries import Setup, Trained, find_kind
from atom_lens.dictionaries.load import load_atoms
from atom_lens.errors import AtomLensError
from atom_lens.evidence.measure import observe
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.interventions.causal import Evaluation, Swaps, known, swaps
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.split import SplitActivations, harvest_for, prompts_of, split_activations
from atom_lens.storage.versions import versions
from atom_lens.studies.cells import claimed, kept
from atom_lens.studies.evaluate import check_split
from atom_lens.studies.intervene.cells import Intervene, cell, class_means, patched, swapped
from atom_lens.studies.intervene.result import Cell, ClassMeans, Interventions, Scan, Swap
from atom_lens.studies.intervene.show import show
from atom_lens.studies.named import pretrained
from atom_lens.studies.study import Study, recipe_command, register
from atom_lens.studies.train.folder import same_activations
from atom_lens.tensors.rows import Rows
from atom_lens.training.fit import fit_together

study = register(Study(name="intervene", result=Interventions, show=show))


def intervene(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Evaluate the kinds in the section `intervene`; returns ``out/<name>`` with intervene.json and plots. Resumes.

    Raises:
        AtomLensError: no atoms or training in the recipe, prompts without answers, fewer than 10 facts that the model
            knows on either side of the split, positions that choose several tokens, or a folder of another recipe.
    """
    atoms, _ = recipe.to_train("intervene")
    if (most := max(recipe.section(Intervene).l0)) > atoms.capacity:
        raise AtomLensError(f"intervene.l0 has {most:g}, allowed is up to atoms.capacity={atoms.capacity}")
    if recipe.positions not in ("subject_last", "last"):
        raise AtomLensError(f"positions is {recipe.positions!r}, intervene allows subject_last and last")
    recipe.source("intervene")
    prompts = prompts_of(recipe)
    if any(prompt.answer is None or prompt.subject is None for prompt in prompts):
        raise AtomLensError(f"prompts of recipe {recipe.name!r} lack a subject or an answer, intervene needs both")
    settings = recipe.section(Intervene)
    loaded = {f"features_{features.name}": pretrained(features, "auto") for features in settings.features}
    if settings.run is not None:
        check_split(Path(settings.run), recipe)
    recipe.other_text.read()  # a missing file is reported now, not after the trainings
    folder = Path(out) / recipe.name
    with claimed(folder, recipe):
        _intervene(recipe, prompts, loaded, folder)
    return folder


def _intervene(recipe: Recipe, prompts: Sequence[Prompt], loaded: Mapping[str, SAE[Any]], folder: Path) -> None:
    found = harvest_for(recipe, prompts)
    same_activations(folder, found.views)
    settings = recipe.model
    backend = open_backend(
        find_model(settings.name, settings.revision), settings.backend, DTYPES[settings.dtype], settings.device
    )
    splits = {hook: split_activations(recipe, prompts, found, hook) for hook in found}
    scan = kept(
        folder / "cells" / "scan.json",
        Scan,
        lambda: _scan(recipe, backend, prompts, splits),
        lambda cell: f"the ceiling is highest at {cell.hook}",
    )
    hook, training = scan.hook, recipe.training
    assert training is not None
    split, facts = splits[hook], [prompts[i] for i in scan.facts]
    pairs = swaps(backend, hook, facts, _generator(recipe), **_reading(recipe))
    seen = swaps(backend, hook, [prompts[i] for i in scan.train_facts], _generator(recipe), **_reading(recipe))
    labels = [str(prompts[i].answer) for i in split.prompts]
    means = kept(
        folder / "cells" / "class_means.json",
        ClassMeans,
        lambda: class_means(backend, hook, pairs, split.x, labels, training.seed, **_reading(recipe)),
        lambda cell: f"flips {cell.flips.mean:.3f}",
    )
    aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge)
    cells = [
        kept(
            folder / "cells" / f"{name}.json",
            Cell,
            lambda name=name, make=make: _cell(recipe, backend, hook, pairs, seen, split.heldout, aip, name, make()),
            _says,
        )
        for name, make in _dictionaries(recipe, hook, split, aip, loaded).items()
    ]
    result = Interventions(
        name=recipe.name,
        model=settings.name,
        hook=hook,
        n=len(split.x),
        n_facts=len(facts),
        n_answers=len({prompt.answer for prompt in facts}),
        scan=scan.hooks,
        class_means=Swap(**{key: means[key] for key in Swap.model_fields}),
        cells=cells,
        versions=versions(),
    )
    study.keep(result, folder)


def _generator(recipe: Recipe) -> torch.Generator:
    assert recipe.training is not None
    return torch.Generator().manual_seed(recipe.training.seed)


def _reading(recipe: Recipe) -> dict[str, Any]:
    return {"positions": recipe.positions, "prepend_bos": recipe.prepend_bos}


def _known(recipe: Recipe, backend: Backend, prompts: Sequence[Prompt], rows: set[int], wanted: int) -> list[int]:
    """`wanted` of `rows` whose answer the model knows, drawn at random: sources may start with the most famous."""
    ordered = sorted(rows)
    drawn = [ordered[i] for i in torch.randperm(len(ordered), generator=_generator(recipe)).tolist()]
    found: list[int] = []
    for start in range(0, len(drawn), 256):
        part = drawn[start : start + 256]
        found += [part[i] for i in known(backend, [prompts[i] for i in part], **_reading(recipe))]
        if len(found) >= wanted:
            break
    if len(found) < 10:
        raise AtomLensError(f"the model knows {len(found)} of {len(drawn)} answers, intervene needs at least 10")
    return found[:wanted]


def _scan(recipe: Recipe, backend: Backend, prompts: Sequence[Prompt], splits: dict[str, SplitActivations]) -> Scan:
    """Facts of both sides, and the ceiling of every hook on training facts: whole activations swapped.

    A prompt belongs to a side if it does so at every hook: dropped massive rows may split hooks differently.
    """
    assert recipe.training is not None
    settings, seed = recipe.section(Intervene), recipe.training.seed
    sides = [
        set.intersection(*(set(rows) for rows in side))
        for side in zip(*((s.prompts, s.heldout_prompts) for s in splits.values()), strict=True)
    ]
    train = _known(recipe, backend, prompts, sides[0], 2 * settings.scan)
    facts = _known(recipe, backend, prompts, sides[1], settings.facts)
    # The facts that choose the hook are not the training facts that are reported.
    choosing, reported = train[: (len(train) + 1) // 2], train[(len(train) + 1) // 2 :]
    hooks = {}
    for hook in splits:
        pairs = swaps(backend, hook, [prompts[i] for i in choosing], _generator(recipe), **_reading(recipe))
        scores = patched(backend, hook, pairs, pairs.target, **_reading(recipe))
        hooks[hook] = swapped(scores, scores, seed).flips
    best = max(hooks, key=lambda hook: hooks[hook].mean)
    return Scan(hook=best, hooks=hooks, facts=facts, train_facts=reported)


def _dictionaries(
    recipe: Recipe, hook: str, split: SplitActivations, aip: AtomicInnerProduct, loaded: Mapping[str, SAE[Any]]
) -> dict[str, Callable[[], SAE[Any]]]:
    """name -> a function that returns the dictionary; `loaded` are pretrained features.

    Raises:
        AtomLensError: a run or pretrained features of another hook, a run with another split, or two of one name.
    """
    settings = recipe.section(Intervene)
    dictionaries: list[tuple[str, Callable[[], SAE[Any]]]] = []
    for name in settings.kinds:
        kind = find_kind(name, Trained)
        for level in getattr(settings, kind.sparsity):
            dictionaries.append((f"{name}-{level:g}", partial(_trained, recipe, kind, level, split, aip)))
    loaded = dict(loaded)
    if settings.run is not None:
        loaded[f"run_{Path(settings.run).name}"] = load_atoms(settings.run, hook=hook)
    for name, sae in loaded.items():
        if sae.cfg.metadata.hook_name != hook:
            raise AtomLensError(
                f"{name} belongs to hook {sae.cfg.metadata.hook_name!r}, the facts are asked at {hook!r}"
            )
        dictionaries.append((name, lambda sae=sae: sae))
    if len(dict(dictionaries)) < len(dictionaries) or len(loaded) < len(settings.features) + (settings.run is not None):
        raise AtomLensError(
            f"two dictionaries of recipe {recipe.name!r} have the same name: "
            f"{', '.join(name for name, _ in dictionaries)}"
        )
    return dict(dictionaries)


def _trained(recipe: Recipe, kind: Trained, level: float, split: SplitActivations, aip: AtomicInnerProduct) -> SAE[Any]:
    assert recipe.atoms is not None and recipe.training is not None
    training = recipe.training
    setup = Setup(split.x, aip, recipe.atoms, training.device, training.steps, split.validation)
    learner = kind.start(setup, level, training.seed)
    fit_together({"x": split.x}, {kind.name: learner}, training)
    return kind.finish(learner, aip)


def _cell(
    recipe: Recipe,
    backend: Backend,
    hook: str,
    pairs: Swaps,
    seen: Swaps,
    heldout: Float[Tensor | Rows, "n d"],
    aip: AtomicInnerProduct,
    name: str,
    sae: SAE[Any],
) -> Cell:
    assert recipe.training is not None
    seed = recipe.training.seed
    figures = observe(sae, heldout, aip).figures
    sae.to(backend.device)
    asked, train = (Evaluation(backend, hook, sae, facts, seed=seed, **_reading(recipe)) for facts in (pairs, seen))
    return cell(name, figures, asked, train, recipe.section(Intervene), recipe.other_text.read())


def _says(cell: Cell) -> str:
    return f"flips {cell.swap['swap'].flips.mean:.3f} of {cell.swap['patch'].flips.mean:.3f}"


def _from_file(recipe: str, overrides: Sequence[str], out: Path) -> Path:
    return intervene(load_recipe(recipe, overrides), out)


command = recipe_command(study, _from_file, "atom-lens intervene intervene")
