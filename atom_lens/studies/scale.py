"""Capacity: how R² and q* depend on the number of activations n and of atoms F, in and out of sample.

The paper reports that R² jumps to 1 once F passes a value that grows with n. Here every n and F is trained from several
seeds, on activations and, as the null, on activations whose coordinates were shuffled; all trainings of one n share one
pass over its rows, and every n is kept as soon as it is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from atom_lens.dictionaries import Learner
from atom_lens.dictionaries.nulls import shuffle_coordinates
from atom_lens.dictionaries.tsae.kinds import finish, tsae_learner
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import observe
from atom_lens.evidence.report import versions
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.recipe import Recipe, register_section
from atom_lens.recipe.split import SplitActivations
from atom_lens.storage.files import write_json
from atom_lens.storage.schema import Section
from atom_lens.studies.cells import Cell, claimed, kept, splits
from atom_lens.studies.report_text import aligned
from atom_lens.studies.scale_law import draw, laws
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows
from atom_lens.training.fit import fit_together

logger = logging.getLogger(__name__)
_DATA = ("activations", "shuffled")


class Scale(Section):
    """The grid of `atom-lens scale`: every capacity at every number of training activations, `training.seeds` each."""

    capacities: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    n: list[Annotated[int, Field(ge=2)]] = Field(min_length=1, description="training activations, drawn nested")
    null: bool = Field(True, description="the same grid on activations whose coordinates were shuffled")
    levels: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.9], min_length=1, description="of R², at which the critical capacity is read off"
    )


register_section("scale", Scale)


def scale(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Train and measure the grid of the section `scale` at every hook; returns ``out/<name>`` with JSON and figures.

    Under `torchrun` the processes share out the trainings.

    Raises:
        ValueError: the recipe lacks atoms, training or scale, has fewer activations than `scale.n` asks for, or the
            folder holds a study of another recipe.
    """
    atoms, _ = recipe.to_train("scale")
    if (least := min(recipe.section(Scale).capacities)) < atoms.target_l0:
        raise ValueError(f"scale.capacities has {least}, allowed is at least atoms.target_l0={atoms.target_l0:g}")
    folder = Path(out) / recipe.name
    with parallel.processes(), claimed(folder, recipe):
        _scale(recipe, folder)
    return folder


def _scale(recipe: Recipe, folder: Path) -> None:
    hooks = {}
    for hook, split in splits(recipe, folder):
        if max(recipe.section(Scale).n) > len(split.x):
            raise ValueError(
                f"scale.n has {max(recipe.section(Scale).n)}, the training activations at {hook} are {len(split.x)}"
            )
        rows = [
            kept(folder / "cells" / hook / f"n-{n}.json", lambda n=n, split=split: _row(recipe, split, n), _says)
            for n in sorted(recipe.section(Scale).n)
        ]
        cells = [cell for row in rows for cell in row["cells"]]
        hooks[hook] = {"d_in": split.x.shape[1], "cells": cells, "laws": laws(cells, recipe.section(Scale).levels)}
    result = {"schema_version": 1, "model": recipe.model.name, "hooks": hooks, "versions": versions()}
    if parallel.rank() == 0:
        write_json(folder / "scale.json", result)
        for hook, one in hooks.items():
            draw(one, f"{hook} of {recipe.model.name}", folder / f"{hook}.png")


def _says(row: Cell) -> str:
    r2 = {cell["capacity"]: cell["runs"][0]["heldout"]["r2"] for cell in row["cells"] if cell["data"] == "activations"}
    return "held-out R² " + ", ".join(f"{value:.3f} at F = {capacity}" for capacity, value in r2.items())


def _row(recipe: Recipe, split: SplitActivations, n: int) -> Cell:
    """All capacities at the same n activations, all seeds, real and shuffled, from one pass."""
    assert recipe.atoms is not None and recipe.training is not None
    training = recipe.training
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(split.x), generator=generator)  # the same for every n: smaller sets lie in larger ones
    x = split.x.select(order[:n])
    data: dict[str, tuple[Float[Tensor | Rows, "n d"], Float[Tensor | Rows, "m d"], AtomicInnerProduct]] = {}
    for name in _DATA[: 1 + recipe.section(Scale).null]:
        here, heldout = x, split.heldout
        if name == "shuffled":
            here, heldout = shuffle_coordinates(here, generator), shuffle_coordinates(heldout, generator)
        data[name] = here, heldout, AtomicInnerProduct.estimate(here, recipe.metric.ridge, f"{n} {name}")
    learners: dict[str, Learner] = {}
    for capacity in recipe.section(Scale).capacities:
        atoms = recipe.atoms.model_copy(update={"capacity": capacity})
        for seed in range(training.seeds):
            for name, (here, _, aip) in data.items():
                learners[f"{name} {capacity} {seed}"] = tsae_learner(
                    here, aip, atoms, training.device, seed=training.seed + seed, stream=name
                )
    fit_together({name: here for name, (here, *_) in data.items()}, learners, training)
    cells = []
    for name, (here, heldout, aip) in data.items():
        for capacity in recipe.section(Scale).capacities:
            runs = [finish(learners[f"{name} {capacity} {seed}"], aip) for seed in range(training.seeds)]
            seen = [{"train": observe(run, here, aip), "heldout": observe(run, heldout, aip)} for run in runs]
            alive = [one["train"].alive for one in seen]
            same = None
            if len(runs) > 1 and all(mask.any() for mask in alive):
                same = identity([run.W_dec.detach() for run in runs], aip, alive).figures
            figures = [{part: one.figures for part, one in each.items()} for each in seen]
            cells.append({"n": n, "capacity": capacity, "data": name, "runs": figures, "identity": same})
    return {"cells": cells}


def scale_table(found: Mapping[str, Any]) -> str:
    """R² of every n and F: training, held-out, and both for shuffled coordinates; then the laws."""
    blocks = []
    for hook, one in found["hooks"].items():
        capacities = sorted({cell["capacity"] for cell in one["cells"]})
        for title, data, split in _BLOCKS:
            cells = [cell for cell in one["cells"] if cell["data"] == data]
            if not cells:
                continue
            rows = [[f"{title}, n =", *(f"F = {capacity}" for capacity in capacities)]]
            for n in sorted({cell["n"] for cell in cells}):
                at = {cell["capacity"]: cell["runs"] for cell in cells if cell["n"] == n}
                rows.append([str(n), *(_shown(at[capacity], split) for capacity in capacities)])
            blocks.append(f"{hook}\n{aligned(rows)}")
        blocks.append("\n".join(_sentence(law) for law in one["laws"]))
    return "\n\n".join(blocks)


_BLOCKS = (
    ("R² train", "activations", "train"),
    ("R² held-out", "activations", "heldout"),
    ("shuffled, R² train", "shuffled", "train"),
    ("shuffled, R² held-out", "shuffled", "heldout"),
)


def _shown(runs: Sequence[Mapping[str, Any]], split: str) -> str:
    """Mean over seeds of R², and of q* behind it."""
    r2, q = (sum(run[split][key] for run in runs) / len(runs) for key in ("r2", "q_star"))
    return f"{r2:.3f} ({q:.3f})"


def _sentence(law: Mapping[str, Any]) -> str:
    what = f"{law['data']}, {law['split'].replace('heldout', 'held-out')}: F at R² {law['level']:g}"
    if law["exponent"] is None:
        return f"{what} is reached at {len(law['points'])} of {law['of']} n, too few for a law"
    low, high = law["exponent_interval"]
    return (
        f"{what} grows as n to the power {law['exponent']:.2f} (95%: {low:.2f} to {high:.2f}), "
        f"{law['factor']:.2g} n^{law['exponent']:.2f}"
    )
