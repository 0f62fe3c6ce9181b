"""Units side by side: neurons, stock SAEs, pretrained features and our atoms on the same activations and budget.

Every cell (a unit at one sparsity, all seeds) is kept as soon as it is measured, so a comparison that was stopped goes
on where it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from atom_lens._files import write_json
from atom_lens.activations.models import pick_device
from atom_lens.evidence import identity, observe
from atom_lens.evidence.bases import neurons, principal
from atom_lens.evidence.bootstrap import intervals
from atom_lens.evidence.faithfulness import explained
from atom_lens.evidence.measure import Dictionary, Observation
from atom_lens.evidence.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.evidence.report import versions
from atom_lens.experiments.frontier import draw, to_csv
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.training.fit import Learner, fit_together
from atom_lens.training.recipe import Features, Recipe, dump_recipe
from atom_lens.training.run import SplitActivations, harvest_for, split_activations
from atom_lens.training.units import trained_unit, unit_learner

logger = logging.getLogger(__name__)
_Cell = dict[str, Any]


def compare(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Measure every unit of `recipe.compare` at every hook; returns ``out/<name>`` with JSON, CSV and figures.

    Raises:
        ValueError: the recipe lacks atoms or training, or the folder holds a comparison of another recipe.
    """
    for section in ("atoms", "training"):
        if getattr(recipe, section) is None:
            raise ValueError(f"key {section} is missing in recipe {recipe.name!r}, compare needs it")
    folder = Path(out) / recipe.name
    _claim(folder, recipe)
    prompts = recipe.prompts.read()
    found = harvest_for(recipe, prompts)
    hooks = {}
    for hook in found:
        split = split_activations(recipe, prompts, found, hook)
        aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, f"{len(split.x)} training activations")
        cells = [_kept(folder / "cells" / hook / f"{key}.json", make) for key, make in _cells(recipe, split, aip)]
        assert recipe.atoms is not None
        hooks[hook] = {
            "n": len(split.x),
            "n_heldout": len(split.heldout),
            "d_in": aip.width,
            "d_sae": recipe.atoms.capacity,
            "n_over_f": len(split.x) / recipe.atoms.capacity,
            "metric": {"n": aip.n, "ridge": aip.ridge, "condition": aip.condition},
            "cells": cells,
        }
    result = {"schema_version": 1, "model": recipe.model.name, "hooks": hooks, "versions": versions()}
    write_json(folder / "compare.json", result)
    to_csv(result, folder / "compare.csv")
    for hook in hooks:
        draw(hooks[hook], f"{hook} of {recipe.model.name}", folder / f"{hook}.png")
    return folder


def _claim(folder: Path, recipe: Recipe) -> None:
    """A folder is continued by the recipe that began it only."""
    kept, text = folder / "recipe.yaml", dump_recipe(recipe)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not kept.is_file())):
        raise FileExistsError(f"output folder {str(folder)!r} is not empty: choose another name= or remove it")
    if kept.is_file() and kept.read_text(encoding="utf-8") != text:
        raise ValueError(f"{str(folder)!r} holds a comparison of another recipe: choose another name= or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(text, encoding="utf-8")


def _kept(path: Path, make: Callable[[], _Cell]) -> _Cell:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.monotonic()
    cell = make()
    cell["seconds"] = time.monotonic() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, cell)
    run = cell["runs"][0]["heldout"]
    logger.info(
        "%-24s held-out R² %.3f, q* %.3f, L0 %.1f, %.0f s",
        path.stem,
        run["r2"],
        run["q_star"],
        run["l0"]["mean"],
        cell["seconds"],
    )
    return cell


def _cells(
    recipe: Recipe, split: SplitActivations, aip: AtomicInnerProduct
) -> Iterator[tuple[str, Callable[[], _Cell]]]:
    """(name, what measures it), nulls first."""
    assert recipe.atoms is not None and recipe.training is not None
    n_atoms, training = recipe.atoms.capacity, recipe.training
    for k in sorted({max(1, round(level)) for level in recipe.compare.l0}):
        for name in ("random", "data"):
            yield f"null_{name}-{k}", lambda name=name, k=k: _null_cell(name, k, n_atoms, split, aip, training.seed)
    for unit in recipe.compare.units:
        if unit == "neurons":
            yield unit, lambda: _cell("neurons", None, [neurons(split.x)], split, aip)
        elif unit == "principal":
            for k in sorted({max(1, round(level)) for level in recipe.compare.l0} | {aip.width}):
                yield f"{unit}-{k}", lambda k=k: _cell("principal", float(k), [principal(split.x, aip, k)], split, aip)
        else:
            for level in recipe.compare.l1 if unit.startswith("relu") else recipe.compare.l0:
                yield f"{unit}-{level:g}", lambda unit=unit, level=level: _trained(unit, level, recipe, split, aip)
    for features in recipe.compare.features:
        yield (
            f"features_{features.name}",
            lambda features=features: _cell(features.name, None, [_pretrained(features, training.device)], split, aip),
        )


def _trained(unit: str, level: float, recipe: Recipe, split: SplitActivations, aip: AtomicInnerProduct) -> _Cell:
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
) -> _Cell:
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


def _null_cell(name: str, k: int, n_atoms: int, split: SplitActivations, aip: AtomicInnerProduct, seed: int) -> _Cell:
    """A null at its best in either norm: R² of a Euclidean pursuit, all else of a pursuit under the metric."""
    generator = torch.Generator().manual_seed(seed)
    mean = split.x.mean(dim=0)
    null = random_atoms(n_atoms, aip, generator) if name == "random" else data_atoms(split.x, n_atoms, mean, generator)
    k = min(k, *null.shape)
    pursued, euclidean = Pursuit(null, mean, aip, k), Pursuit(null, mean, None, k)
    figures: Mapping[str, Any] = {
        part: _best(observe(pursued, rows, aip), euclidean.residual(rows))
        for part, rows in (("train", split.x), ("heldout", split.heldout))
    }
    return {"unit": f"null_{name}", "level": k, "runs": [figures], "identity": None}


def _best(seen: Observation, residual: Float[Tensor, " n"]) -> dict[str, Any]:
    return {**seen.figures, "r2": explained(residual, seen.total)}


def _pretrained(features: Features, device: str) -> SAE[Any]:
    device = pick_device(device)
    if features.path is not None:
        if not (Path(features.path) / SAE_CFG_FILENAME).is_file():
            raise ValueError(f"compare.features {features.name!r}: no {SAE_CFG_FILENAME} in path {features.path!r}")
        return SAE.load_from_disk(features.path, device=device)
    return SAE.from_pretrained(str(features.release), str(features.sae_id), device=device)
