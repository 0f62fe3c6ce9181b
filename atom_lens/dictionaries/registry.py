"""The registry of kinds of dictionaries: name, label and look of each, what sets its sparsity, how it is made.

Recipes name kinds; tables, plots and the page take labels and looks from here, so a new kind takes one call:
`register(Trained(name="mine", label="Mine", start=..., finish=...))`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from torch import Tensor

from atom_lens.dictionaries.learning import Learning
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.sections import Atoms
from atom_lens.tensors.rows import Rows

GREY = "#8a8f98"

# "l0" is a target of the mean L0, or K; "l1" is the weight of an L1 penalty.
Sparsity = Literal["l0", "l1"]
# Ours are compared with baselines. Controls are not sparse dictionaries; nulls have learned nothing.
Role = Literal["ours", "baseline", "control", "null"]


class Setup(NamedTuple):
    """What a dictionary is made from.

    Attributes:
        x: training activations, shape (n, d).
        aip: their metric.
        atoms: the recipe's section: capacity, and what each kind needs besides.
        device: where it trains.
        steps: of its training.
        calibration: activations not trained on, shape (m, d), on which thresholds may be set.
        metadata: of the sae-lens config: model_name, hook_name, ...
        stream: the name of the stream that its activations come from in training.
    """

    x: Float[Tensor | Rows, "n d"]
    aip: AtomicInnerProduct
    atoms: Atoms
    device: str = "cpu"
    steps: int = 1000
    calibration: Float[Tensor | Rows, "m d"] | None = None
    metadata: Mapping[str, Any] = MappingProxyType({})
    stream: str = "x"


@dataclass(frozen=True)
class Learner:
    """A dictionary to be trained, and the stream that it reads; `calibration` is that of its `Setup`."""

    sae: TrainingSAE[Any]
    stream: str = "x"
    calibration: Float[Tensor | Rows, "m d"] | None = None

    @classmethod
    def begun(cls, make: Callable[[], Learning], setup: Setup, seed: int) -> Learner:
        """The dictionary that `make` returns, at its start on the activations of `setup`."""
        # sae-lens draws initial weights, which are overwritten, from the global generator: leave that as it was.
        with torch.random.fork_rng(devices=[]):
            sae = make()
        sae.begin(setup.x, setup.aip, torch.Generator().manual_seed(seed))
        return cls(sae, setup.stream, setup.calibration)


def finish(learner: Learner, aip: AtomicInnerProduct) -> Metered:
    """The trained dictionary of a learner that was `begun`, on raw activations, with its metric."""
    assert isinstance(learner.sae, Learning)
    return learner.sae.finish()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of dictionary.

    Attributes:
        name: in recipes and results.
        label: for people.
        role: what it is in a comparison.
        color: of a family, as #rrggbb.
        marker: matplotlib's name of one.
        line: matplotlib's name of a line style.
        sparsity: which of a recipe's sweeps it takes; None for a kind whose sparsity nothing sets.
        least: the smallest level that it accepts.
        by_default: whether comparisons include it by default.
    """

    name: str
    label: str
    role: Role = "baseline"
    color: str = GREY
    marker: str = "p"
    line: str = "-"
    sparsity: Sparsity | None = None
    least: float = 0.0
    by_default: bool = True

    def asked(self, level: float | int | None) -> str:
        """How to write a level of this kind: "L1 5"; empty for None."""
        return "" if level is None else f"{'L1' if self.sparsity == 'l1' else 'asked'} {level:g}"


@dataclass(frozen=True, kw_only=True)
class Trained(Kind):
    """A kind that is trained: `start` gives a learner at a level from a seed, `finish` the trained dictionary."""

    start: Callable[[Setup, float, int], Learner]
    finish: Callable[[Learner, AtomicInnerProduct], SAE[Any]]
    sparsity: Sparsity = "l0"


@dataclass(frozen=True, kw_only=True)
class Fixed(Kind):
    """A kind that is made without a trainer. With a `sparsity` its level is a number of directions.

    `whole` says whether it is also measured with as many directions as the width.
    """

    make: Callable[[Setup, int], Dictionary]
    role: Role = "control"
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Drawn(Kind):
    """A null: rows of shape (F, d) drawn at random, encoded by a pursuit at the sparsity it is compared at."""

    draw: Callable[[Setup, torch.Generator], Float[Tensor, "F d"]]
    role: Role = "null"
    sparsity: Sparsity | None = "l0"
    least: float = 1.0


_KINDS: dict[str, Kind] = {}
AnyKind = TypeVar("AnyKind", bound=Kind)


def register(new: AnyKind) -> AnyKind:
    """Add a kind.

    Raises:
        AtomLensError: another kind has its name.
    """
    if new.name in _KINDS:
        raise AtomLensError(f"a kind of dictionary with name {new.name!r} is registered, each has a name of its own")
    _KINDS[new.name] = new
    return new


def kinds(of: type[AnyKind] = Kind) -> list[AnyKind]:
    """All kinds of a class, in the order of their registration."""
    return [one for one in _KINDS.values() if isinstance(one, of)]


def kind(name: str) -> Kind:
    """The kind of a dictionary in results: a registered one, or pretrained features of that name."""
    return _KINDS.get(name) or Kind(name=name, label=name, color="#c2559d")


def recipes_kind(atoms: Atoms) -> Trained:
    """The kind that a recipe's section `atoms` describes."""
    return find_kind(f"tsae_{atoms.encoder}" if atoms.architecture == "aip_tsae" else atoms.architecture, Trained)


def find_kind(name: str, of: type[AnyKind] = Kind) -> AnyKind:
    """The kind that a recipe asks for.

    Raises:
        AtomLensError: no kind of that class has this name, or a null has it.
    """
    allowed = {one.name: one for one in kinds(of) if one.role != "null"}
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]}" if near else f"allowed are {', '.join(allowed)}"
        raise AtomLensError(f"kind {name!r} is unknown, {hint}")
    return allowed[name]
