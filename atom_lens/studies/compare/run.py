"""Dictionaries side by side: neurons, stock SAEs, pretrained features and our atoms on the same activations and budget.

Every cell (a kind at one sparsity, all seeds) is kept as soon as it is measured, so that a stopped comparison resumes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from atom_lens.dictionaries import Dictionary, Drawn, Fixed, Learner, Setup, Trained, find_kind, kinds
from atom_lens.dictionaries.encoders import Refit, bias_of, under_pursuit
from atom_lens.dictionaries.learning import Learning
from atom_lens.dictionaries.metered import WHITENED
from atom_lens.dictionaries.nulls import Pursuit
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.errors import AtomLensError
from atom_lens.evidence.bootstrap import intervals
from atom_lens.evidence.faithfulness import explained
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import Observation, measure, observe
from atom_lens.evidence.results import Figures, Loss, MetricAbout
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe, register_section
from atom_lens.recipe.sections import Training
from atom_lens.recipe.split import SplitActivations
from atom_lens.storage.schema import Positive, Section
from atom_lens.storage.versions import versions
from atom_lens.studies.cells import claimed, kept, splits
from atom_lens.studies.compare.matched import matched
from atom_lens.studies.compare.result import Cell, Comparison, Hook, Rate, Run
from atom_lens.studies.compare.show import runs_table, show
from atom_lens.studies.cost import Costs
from atom_lens.studies.named import KINDS, Features, KindName, measured_kinds, pretrained
from atom_lens.studies.study import Study, recipe_command, register
from atom_lens.tensors.rows import Rows, mean_row
from atom_lens.training.fit import fit_together

logger = logging.getLogger(__name__)
_PURSUED = 64  # mean L0 beyond which other encoders take longer than the training


class Compare(Section):
    """Dictionaries side by side. Each of `kinds` is swept over `l0` or `l1`, as the registry of kinds says.

    `matched` are values of L0 on held-out activations at which kinds are compared, between two points of a sweep.
    `features` are measured at the hook that they were made for. With several `lr`, each trained kind takes the one that
    explains most of the validation rows at the middle of its sweep, from one seed, among those that have the L0 asked
    for within a tenth (or else the one nearest to it); without any, `training.lr`.
    The model's loss with each dictionary spliced in is measured on `loss_tokens` held-out tokens, if positions are all.
    """

    kinds: list[KindName] = Field(
        default_factory=lambda: [one.name for one in measured_kinds() if one.by_default],
        min_length=1,
        validation_alias=KINDS,
    )
    l0: list[Positive] = Field([4.0, 8.0, 16.0], min_length=1)
    l1: list[Positive] = Field([2.0, 5.0, 12.0], min_length=1)
    matched: list[Positive] = []
    lr: list[Positive] = []
    features: list[Features] = []
    loss_tokens: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _levels_are_allowed(self) -> Compare:
        for one in map(find_kind, self.kinds):
            if one.sparsity and (lowest := min(getattr(self, one.sparsity))) < one.least:
                raise AtomLensError(
                    f"compare.{one.sparsity} has {lowest:g}, allowed is at least {one.least:g} for {one.name}"
                )
        return self

    @model_validator(mode="after")
    def _features_differ(self) -> Compare:
        names = [features.name for features in self.features]
        for name in names:
            if names.count(name) > 1:
                raise AtomLensError(f"compare.features has {name!r} {names.count(name)} times, allowed is once")
        return self


register_section("compare", Compare, Compare.model_validate({}))
study = register(
    Study(name="compare", result=Comparison, show=show, tables=lambda result: {"compare.csv": runs_table(result)})
)


def compare(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Measure every kind of the section `compare` at every hook; returns ``out/<name>`` with JSON, CSV and plots.

    Raises:
        AtomLensError: the recipe lacks atoms or training, asks for more active atoms than there are, or for features
            that cannot be opened or are for another hook; or the folder holds a study of another recipe.
    """
    atoms, _ = recipe.to_train("compare")
    if (most := max(recipe.section(Compare).l0)) > atoms.capacity:
        raise AtomLensError(f"compare.l0 has {most:g}, allowed is up to atoms.capacity={atoms.capacity}")
    if len(recipe.section(Compare).lr) > 1 and not recipe.split.validation:
        raise AtomLensError(
            "compare.lr has several values and split.validation is 0, a share above 0 is needed to choose one"
        )
    costs = Costs(recipe, "compare", recipe.section(Compare).loss_tokens)
    homes = {features.name: _home(features, recipe) for features in recipe.section(Compare).features}
    folder = Path(out) / recipe.name
    with claimed(folder, recipe):
        _compare(recipe, folder, homes, costs)
    return folder


def _home(features: Features, recipe: Recipe) -> str | None:
    """The hook of pretrained features, if they name one; they are opened before hours of training, not after."""
    hook = pretrained(features, "cpu").cfg.metadata.hook_name
    if hook is not None and not any(fnmatchcase(hook, pattern) for pattern in recipe.hooks):
        raise AtomLensError(
            f"features {features.name!r} are for hook {hook!r}, allowed are hooks {', '.join(recipe.hooks)}"
        )
    return hook


def _compare(recipe: Recipe, folder: Path, homes: Mapping[str, str | None], costs: Costs) -> None:
    hooks = {}
    atoms, _ = recipe.to_train("compare")
    asked = recipe.section(Compare)
    for hook, split in splits(recipe, folder):
        aip = AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, f"{len(split.x)} training activations")
        on = _Setting(split, aip, partial(costs.of, hook=hook))
        here = [features for features in asked.features if homes[features.name] in (None, hook)]
        cells = [
            kept(folder / "cells" / hook / f"{key}.json", Cell, make, _says)
            for key, make in _cells(recipe, on, here, folder / "cells" / hook)
        ]
        hooks[hook] = Hook(
            n=len(split.x),
            n_heldout=len(split.heldout),
            d_in=aip.width,
            d_sae=atoms.capacity,
            n_over_f=len(split.x) / atoms.capacity,
            metric=MetricAbout(n=aip.n, ridge=aip.ridge, condition=aip.condition, source=aip.source),
            cells=cells,
            matched=[row for l0 in asked.matched for row in matched(cells, l0)],
        )
    study.keep(Comparison(model=recipe.model.name, hooks=hooks, versions=versions()), folder)


def _says(cell: Cell) -> str:
    run = cell.runs[0].heldout
    return f"held-out R² {run.r2:.3f}, q* {run.q_star:.3f}, L0 {run.l0.mean:.1f}"


class _Setting(NamedTuple):
    """What every dictionary of a hook is measured with: rows, their metric, and its cost to the model."""

    split: SplitActivations
    aip: AtomicInnerProduct
    cost: Callable[[Sequence[Dictionary]], list[Loss | None]]


def _cells(
    recipe: Recipe, on: _Setting, here: Sequence[Features], folder: Path
) -> Iterator[tuple[str, Callable[[], Cell]]]:
    """(name, the function that measures it), nulls first; `here` are the features of this hook."""
    assert recipe.atoms is not None and recipe.training is not None
    training, asked = recipe.training, recipe.section(Compare)
    split, aip = on.split, on.aip
    setup = Setup(split.x, aip, recipe.atoms, training.device, training.steps, split.validation)
    # A pursuit cannot use more atoms than there are, or than there are directions.
    ks = sorted({min(max(1, round(level)), recipe.atoms.capacity, *split.x.shape) for level in asked.l0})
    for k in ks:
        for null in kinds(Drawn):
            yield f"{null.name}-{k}", partial(_null_cell, null, k, setup, on, training.seed)
    for one in map(find_kind, asked.kinds):
        if isinstance(one, Trained):
            levels = sorted(getattr(asked, one.sparsity))
            own = _with_rate(one, levels[len(levels) // 2], setup, training, asked.lr, folder)
            for level in levels:
                yield f"{one.name}-{level:g}", partial(_trained, one, level, setup, on, own)
        elif isinstance(one, Fixed) and one.sparsity is None:
            yield one.name, partial(_fixed, one, None, setup, on)
        elif isinstance(one, Fixed):
            for k in sorted({*ks, aip.width} if one.whole else ks):
                yield f"{one.name}-{k}", partial(_fixed, one, k, setup, on)
    for features in here:
        yield (
            f"features_{features.name}",
            lambda features=features: _cell(features.name, None, [pretrained(features, training.device)], on),
        )


def _fixed(kind: Fixed, k: int | None, setup: Setup, on: _Setting) -> Cell:
    dictionary = kind.make(setup, setup.aip.width if k is None else k)
    return _cell(kind.name, None if k is None else float(k), [dictionary], on)


def _with_rate(
    kind: Trained, level: float, setup: Setup, training: Training, rates: Sequence[float], folder: Path
) -> Training:
    """`training` with the learning rate of a kind, chosen on validation rows."""
    if len(rates) < 2:
        return training.model_copy(update={"lr": rates[0]}) if rates else training

    def choose() -> Rate:
        found = {}
        for lr in rates:
            learner = kind.start(setup, level, training.seed)
            fit_together({"x": setup.x}, {"one": learner}, training.model_copy(update={"lr": lr}))
            assert setup.calibration is not None
            found[lr] = observe(kind.finish(learner, setup.aip), setup.calibration, setup.aip).figures
        return Rate(
            lr=max(found, key=lambda lr: merit(kind, level, found[lr])),
            validation={f"{lr:g}": one.r2 + one.r2_aip for lr, one in found.items()},
            l0={f"{lr:g}": one.l0.mean for lr, one in found.items()},
        )

    chosen = kept(folder / "rates" / f"{kind.name}.json", Rate, choose, lambda rate: f"learning rate {rate.lr:g}")
    return training.model_copy(update={"lr": chosen.lr})


def merit(kind: Trained, level: float, found: Figures) -> tuple[float, float]:
    """What a learning rate is chosen by: first the L0 asked for, since more atoms explain more, then what is explained.

    All L0 within a tenth of `level` are alike. The weight of an L1 asks for no L0.
    """
    off = abs(math.log(max(found.l0.mean, 1e-9) / level)) if kind.sparsity == "l0" else 0.0
    return -max(off, math.log(1.1)), found.r2 + found.r2_aip


def _trained(kind: Trained, level: float, setup: Setup, on: _Setting, training: Training) -> Cell:
    """All seeds of one kind at one sparsity, from one pass over the activations."""
    learners = {str(i): kind.start(setup, level, training.seed + i) for i in range(training.seeds)}
    # TSAEs start from data, stock SAEs from noise: agreement before training is the baseline of agreement after.
    starts = [_start(learner, setup.aip) for learner in learners.values()]
    fit_together({"x": on.split.x}, learners, training)
    dictionaries = [kind.finish(learner, setup.aip) for learner in learners.values()]
    cell = _cell(kind.name, level, dictionaries, on).model_copy(update={"lr": training.lr})
    if cell.identity is None:
        return cell
    same = cell.identity.model_copy(update={"pw_mcc_start": identity(starts, setup.aip).pw_mcc})
    return cell.model_copy(update={"identity": same})


def _start(learner: Learner, aip: AtomicInnerProduct) -> Float[Tensor, "F d"]:
    """Initial atoms as directions of raw activations."""
    weights = learner.sae.W_dec.detach().double().cpu()
    if learner.sae.cfg.normalize_activations == WHITENED:
        return aip.unwhiten(weights)  # random directions stay random under any whitening of the same data
    whitening = learner.sae.scaler.whitening if isinstance(learner.sae, Learning) else None
    return weights if whitening is None else weights @ whitening.inverse_matrix


def _cell(kind: str, level: float | None, dictionaries: Sequence[Dictionary], on: _Setting) -> Cell:
    runs, alive, (split, aip, _) = [], [], on
    for dictionary, loss in zip(dictionaries, on.cost(dictionaries), strict=True):
        seen = {"train": observe(dictionary, split.x, aip), "heldout": observe(dictionary, split.heldout, aip)}
        interval = {"interval": intervals(seen["heldout"], groups=split.subjects)}
        heldout = seen["heldout"].figures.model_copy(update=interval)
        encoded = _encoded(dictionary, heldout, split, aip)
        runs.append(Run(train=seen["train"].figures, heldout=heldout, loss=loss, **encoded))
        alive.append(seen["train"].alive)
    same = None
    if len(dictionaries) > 1 and all(mask.any() for mask in alive):
        same = identity([d.W_dec.detach().float() for d in dictionaries], aip, alive).figures
    return Cell(kind=kind, level=level, runs=runs, identity=same)


def _encoded(
    dictionary: Dictionary, own: Figures, split: SplitActivations, aip: AtomicInnerProduct
) -> dict[str, Figures | None]:
    """The atoms under other encoders, held-out, which tells atoms and encoder apart."""
    k = own.l0.mean
    if not 1 <= k <= _PURSUED or own.l0.max > 4 * _PURSUED:
        return {}
    bias = bias_of(dictionary)
    refit = Refit(dictionary, aip, bias)
    if isinstance(dictionary, PursuitSAE) and dictionary.cfg.norm == 0:
        return {"refit": None, "pursued": own.model_copy(update={"interval": None})}
    pursued = under_pursuit(dictionary.W_dec.float(), bias, aip, _aside(split), k)
    return {"refit": measure(refit, split.heldout, aip), "pursued": measure(pursued, split.heldout, aip)}


def _aside(split: SplitActivations) -> Float[Tensor | Rows, "n d"]:
    """The rows on which thresholds are set: validation rows, if the recipe asks for some."""
    return split.x if split.validation is None else split.validation


def _null_cell(null: Drawn, k: int, setup: Setup, on: _Setting, seed: int) -> Cell:
    """A null at its best in either norm: R² under a Euclidean pursuit, everything else under one in the metric."""
    split = on.split
    mean = mean_row(split.x).to(split.x.dtype)
    atoms = null.draw(setup, torch.Generator().manual_seed(seed))
    k = min(k, *atoms.shape)  # there may be fewer atoms: a data point at the mean is left out
    pursued, euclidean = Pursuit(atoms, mean, setup.aip, k), Pursuit(atoms, mean, None, k)
    train, heldout = (
        _best(observe(pursued, rows, setup.aip), euclidean.residual(rows)) for rows in (split.x, split.heldout)
    )
    encoded = _encoded(pursued, heldout, split, setup.aip)
    loss = min(on.cost([pursued, euclidean]), key=lambda one: one.spliced if one else 0)
    return Cell(kind=null.name, level=float(k), runs=[Run(train=train, heldout=heldout, loss=loss, **encoded)])


def _best(seen: Observation, residual: Float[Tensor, " n"]) -> Figures:
    return seen.figures.model_copy(update={"r2": explained(residual, seen.total)})


def _from_file(recipe: str, overrides: Sequence[str], out: Path) -> Path:
    return compare(load_recipe(recipe, overrides), out)


command = recipe_command(study, _from_file, "atom-lens compare compare compare.l0=[4,8]")
