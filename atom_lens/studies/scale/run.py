"""Capacity: how R² and q* depend on the number of activations n and of atoms F, in and out of sample.

The paper reports that R² jumps to 1 once F passes a value that grows with n. Here dictionaries are trained at every n
and F from several seeds, on activations and, as the null, on activations whose coordinates were shuffled; all trainings
of one n share one pass over its rows, and every n is kept as soon as it is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from atom_lens.dictionaries import Dictionary, Learner, Setup, recipes_kind
from atom_lens.dictionaries.nulls import shuffle_coordinates
from atom_lens.errors import AtomLensError
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import observe
from atom_lens.evidence.results import Loss
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe, register_section
from atom_lens.recipe.split import SplitActivations
from atom_lens.storage.schema import Section
from atom_lens.storage.versions import versions
from atom_lens.studies.cells import claimed, kept, splits
from atom_lens.studies.cost import Costs
from atom_lens.studies.scale.law import growth, laws
from atom_lens.studies.scale.result import Cell, Grid, Row, Run, Scaling
from atom_lens.studies.scale.show import show
from atom_lens.studies.study import Study, recipe_command, register
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
    loss_tokens: int = Field(0, ge=0, description="held-out tokens that the loss of each dictionary is measured on")
    levels: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.9], min_length=1, description="of R², at which the critical capacity is read off"
    )


register_section("scale", Scale)
study = register(Study(name="scale", result=Scaling, show=show))


def scale(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Train and measure the grid of the section `scale` at every hook; returns ``out/<name>`` with JSON and figures.

    Under `torchrun` the processes divide the trainings.

    Raises:
        AtomLensError: the recipe lacks atoms, training or scale, has fewer activations than `scale.n` asks for, or the
            folder holds a study of another recipe.
    """
    atoms, _ = recipe.to_train("scale")
    if (least := min(recipe.section(Scale).capacities)) < atoms.target_l0:
        raise AtomLensError(f"scale.capacities has {least}, allowed is at least atoms.target_l0={atoms.target_l0:g}")
    folder = Path(out) / recipe.name
    costs = Costs(recipe, "scale", recipe.section(Scale).loss_tokens)
    with parallel.processes(), claimed(folder, recipe):
        _scale(recipe, folder, costs)
    return folder


def _scale(recipe: Recipe, folder: Path, costs: Costs) -> None:
    hooks = {}
    for hook, split in splits(recipe, folder):
        if max(recipe.section(Scale).n) > len(split.x):
            raise AtomLensError(
                f"scale.n has {max(recipe.section(Scale).n)}, the training activations at {hook} are {len(split.x)}"
            )
        rows = [
            kept(
                folder / "cells" / hook / f"n-{n}.json",
                Row,
                partial(_row, recipe, split, n, partial(costs.of, hook=hook)),
                _says,
            )
            for n in sorted(recipe.section(Scale).n)
        ]
        cells = [cell for row in rows for cell in row.cells]
        hooks[hook] = Grid(
            d_in=split.x.shape[1], cells=cells, laws=laws(cells, recipe.section(Scale).levels), growth=growth(cells)
        )
    if parallel.rank() == 0:
        study.keep(Scaling(model=recipe.model.name, hooks=hooks, versions=versions()), folder)


def _says(row: Row) -> str:
    r2 = {cell.capacity: cell.runs[0].heldout.r2 for cell in row.cells if cell.data == "activations"}
    return "held-out R² " + ", ".join(f"{value:.3f} at F = {capacity}" for capacity, value in r2.items())


def _row(
    recipe: Recipe, split: SplitActivations, n: int, cost: Callable[[Sequence[Dictionary]], list[Loss | None]]
) -> Row:
    """All capacities at the same n activations, all seeds, real and shuffled, from one pass."""
    assert recipe.atoms is not None and recipe.training is not None
    training = recipe.training
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(split.x), generator=generator)  # the same for every n: larger sets contain smaller ones
    x = split.x.select(order[:n])
    data: dict[str, tuple[Float[Tensor | Rows, "n d"], Float[Tensor | Rows, "m d"], AtomicInnerProduct]] = {}
    for name in _DATA[: 1 + recipe.section(Scale).null]:
        here, heldout = x, split.heldout
        if name == "shuffled":
            here, heldout = shuffle_coordinates(here, generator), shuffle_coordinates(heldout, generator)
        data[name] = here, heldout, AtomicInnerProduct.estimate(here, recipe.metric.ridge, f"{n} {name}")
    learners: dict[str, Learner] = {}
    kind = recipes_kind(recipe.atoms)
    for capacity in recipe.section(Scale).capacities:
        atoms = recipe.atoms.model_copy(update={"capacity": capacity})
        for seed in range(training.seeds):
            for name, (here, _, aip) in data.items():
                aside = split.validation if name == "activations" else None
                setup = Setup(here, aip, atoms, training.device, training.steps, aside, stream=name)
                learner = kind.start(setup, atoms.target_l0, training.seed + seed)
                learners[f"{name} {capacity} {seed}"] = learner
    fit_together({name: here for name, (here, *_) in data.items()}, learners, training)
    cells = []
    for name, (here, heldout, aip) in data.items():
        for capacity in recipe.section(Scale).capacities:
            runs = [kind.finish(learners[f"{name} {capacity} {seed}"], aip) for seed in range(training.seeds)]
            seen = [{"train": observe(run, here, aip), "heldout": observe(run, heldout, aip)} for run in runs]
            alive = [one["train"].alive for one in seen]
            same = None
            if len(runs) > 1 and all(mask.any() for mask in alive):
                same = identity([run.W_dec.detach() for run in runs], aip, alive).figures
            losses = cost(runs) if name == "activations" else [None] * len(runs)
            measured = [
                Run(train=one["train"].figures, heldout=one["heldout"].figures, loss=loss)
                for one, loss in zip(seen, losses, strict=True)
            ]
            cells.append(Cell(n=n, capacity=capacity, data=name, runs=measured, identity=same))
    return Row(cells=cells)


def _from_file(recipe: str, overrides: Sequence[str], out: Path) -> Path:
    return scale(load_recipe(recipe, overrides), out)


command = recipe_command(study, _from_file, "atom-lens scale capacity")
