"""Units side by side: neurons, stock SAEs, pretrained features and our atoms on the same activations and budget.

Every cell (a unit at one sparsity, all seeds) is kept as soon as it is measured, so a comparison that was stopped goes
on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens._files import write_json
from atom_lens.evidence import identity, observe
from atom_lens.evidence.bases import neurons, principal
from atom_lens.evidence.bootstrap import intervals
from atom_lens.evidence.faithfulness import explained
from atom_lens.evidence.measure import Dictionary, Observation
from atom_lens.evidence.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.evidence.report import versions
from atom_lens.experiments.cells import Cell, claimed, kept, pretrained, splits
from atom_lens.experiments.frontier import draw, to_csv
from atom_lens.experiments.layers import draw_layers
from atom_lens.experiments.matched import matched
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.rows import mean_row
from atom_lens.training.fit import Learner, fit_together
from atom_lens.training.recipe import Features, Recipe
from atom_lens.training.run import SplitActivations
from atom_lens.training.units import trained_unit, unit_learner

logger = logging.getLogger(__name__)


def compare(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Measure every unit of `recipe.compare` at every hook; returns ``out/<name>`` with JSON, CSV and figures.

    Raises:
        ValueError: the recipe lacks atoms or training, asks for more active units than there are, or for features that
            cannot be opened or are of another hook; or the folder holds a study of another recipe.
    """
    recipe.needs("compare", "atoms", "training")
    assert recipe.atoms is not None
    # Not for the recipe to check: a run of `train` has a section compare too, with whatever defaults.
    if max(recipe.compare.l0) > recipe.atoms.capacity:
        raise ValueError(
            f"compare.l0 has {max(recipe.compare.l0):g}, allowed is up to atoms.capacity={recipe.atoms.capacity}"
        )
    homes = {features.name: _home(features, recipe) for features in recipe.compare.features}
    folder = Path(out) / recipe.name
    with claimed(folder, recipe):
        _compare(recipe, folder, homes)
    return folder


def _home(features: Features, recipe: Recipe) -> str | None:
    """The hook that pretrained features are of, if they say so; opened before hours of training, not after them."""
    hook = pretrained(features, "cpu").cfg.metadata.hook_name
    if hook is not None and not any(fnmatchcase(hook, pattern) for pattern in recipe.hooks):
        raise ValueError(
            f"features {features.name!r} are of hook {hook!r}, allowed are hooks {', '.join(recipe.hooks)}"
        )
    return hook


def _compare(recipe: Recipe, folder: Path, homes: Mapping[str, str | None]) -> None:
    hooks = {}
    for hook, split in splits(recipe, folder):
        aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, f"{len(split.x)} training activations")
        here = [features for features in recipe.compare.features if homes[features.name] in (None, hook)]
        cells = [
            kept(folder / "cells" / hook / f"{key}.json", make, _says) for key, make in _cells(recipe, split, aip, here)
        ]
        assert recipe.atoms is not None
        hooks[hook] = {
            "n": len(split.x),
            "n_heldout": len(split.heldout),
            "d_in": aip.width,
            "d_sae": recipe.atoms.capacity,
            "n_over_f": len(split.x) / recipe.atoms.capacity,
            "metric": {"n": aip.n, "ridge": aip.ridge, "condition": aip.condition},
            "cells": cells,
            "matched": [row for l0 in recipe.compare.matched for row in matched(cells, l0)],
        }
    result = {"schema_version": 1, "model": recipe.model.name, "hooks": hooks, "versions": versions()}
    write_json(folder / "compare.json", result)
    to_csv(result, folder / "compare.csv")
    for hook in hooks:
        draw(hooks[hook], f"{hook} of {recipe.model.name}", folder / f"{hook}.png")
    if len(hooks) > 1:
        draw_layers(result, folder / "layers.png")


def _says(cell: Cell) -> str:
    run = cell["runs"][0]["heldout"]
    return f"held-out R² {run['r2']:.3f}, q* {run['q_star']:.3f}, L0 {run['l0']['mean']:.1f}"


def _cells(
    recipe: Recipe, split: SplitActivations, aip: AtomicInnerProduct, here: Sequence[Features]
) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """(name, what measures it), nulls first; `here` are the features of this hook."""
    assert recipe.atoms is not None and recipe.training is not None
    n_atoms, training, asked = recipe.atoms.capacity, recipe.training, recipe.compare
    # No pursuit takes more atoms than there are, or than directions.
    ks = sorted({min(max(1, round(level)), n_atoms, *split.x.shape) for level in asked.l0})
    for k in ks:
        for name in ("random", "data"):
            yield f"null_{name}-{k}", lambda name=name, k=k: _null_cell(name, k, n_atoms, split, aip, training.seed)
    for unit in dict.fromkeys(asked.units):
        if unit == "neurons":
            yield unit, lambda: _cell("neurons", None, [neurons(split.x)], split, aip)
        elif unit == "principal":
            for k in sorted({*ks, aip.width}):
                yield f"{unit}-{k}", lambda k=k: _cell("principal", float(k), [principal(split.x, aip, k)], split, aip)
        else:
            for level in dict.fromkeys(asked.l1 if unit.startswith(("relu", "gated")) else asked.l0):
                yield f"{unit}-{level:g}", lambda unit=unit, level=level: _trained(unit, level, recipe, split, aip)
    for features in here:
        yield (
            f"features_{features.name}",
            lambda features=features: _cell(features.name, None, [pretrained(features, training.device)], split, aip),
        )


def _trained(unit: str, level: float, recipe: Recipe, split: SplitActivations, aip: AtomicInnerProduct) -> Cell:
    """All seeds of one unit at one sparsity, from one pass over the activations."""
    assert recipe.atoms is not None and recipe.training is not None
    training = recipe.training
    learners = {
        str(i): unit_learner(unit, level, split.x, aip, recipe.atoms, training.device, training.seed + i)
        for i in range(training.seeds)
    }
    # TSAEs start from data, stock SAEs from noise: what agrees before training says nothing.
    starts = [_start(learner, aip) for learner in learners.values()]
    fit_together({"x": split.x}, learners, training)
    dictionaries = [trained_unit(learner, aip) for learner in learners.values()]
    cell = _cell(unit, level, dictionaries, split, aip)
    if cell["identity"]:
        cell["identity"]["pw_mcc_start"] = identity(starts, aip).pw_mcc
    return cell


def _start(learner: Learner, aip: AtomicInnerProduct) -> Float[Tensor, "F d"]:
    """Initial atoms as directions of raw activations."""
    weights = learner.sae.W_dec.detach().double().cpu()
    whitening = learner.whitening
    if whitening is None and learner.sae.cfg.normalize_activations == "covariance_whitening":
        return aip.unwhiten(weights)  # random directions stay random under any whitening of the same data
    return weights if whitening is None else weights @ whitening.inverse_matrix


def _cell(
    unit: str, level: float | None, dictionaries: Sequence[Dictionary], split: SplitActivations, aip: AtomicInnerProduct
) -> Cell:
    runs, alive = [], []
    for dictionary in dictionaries:
        seen = {"train": observe(dictionary, split.x, aip), "heldout": observe(dictionary, split.heldout, aip)}
        runs.append({name: dict(one.figures) for name, one in seen.items()})
        runs[-1]["heldout"]["interval"] = intervals(seen["heldout"], groups=split.subjects)
        alive.append(seen["train"].alive)
    same = None
    if len(dictionaries) > 1 and all(mask.any() for mask in alive):
        same = identity([d.W_dec.detach().float() for d in dictionaries], aip, alive).figures
    return {"unit": unit, "level": level, "runs": runs, "identity": same}


def _null_cell(name: str, k: int, n_atoms: int, split: SplitActivations, aip: AtomicInnerProduct, seed: int) -> Cell:
    """A null at its best in either norm: R² of a Euclidean pursuit, all else of a pursuit under the metric."""
    generator = torch.Generator().manual_seed(seed)
    mean = mean_row(split.x).to(split.x.dtype)
    null = random_atoms(n_atoms, aip, generator) if name == "random" else data_atoms(split.x, n_atoms, mean, generator)
    k = min(k, *null.shape)  # a data point at the mean is no atom
    pursued, euclidean = Pursuit(null, mean, aip, k), Pursuit(null, mean, None, k)
    figures: Mapping[str, Any] = {
        part: _best(observe(pursued, rows, aip), euclidean.residual(rows))
        for part, rows in (("train", split.x), ("heldout", split.heldout))
    }
    return {"unit": f"null_{name}", "level": k, "runs": [figures], "identity": None}


def _best(seen: Observation, residual: Float[Tensor, " n"]) -> dict[str, Any]:
    return {**seen.figures, "r2": explained(residual, seen.total)}
