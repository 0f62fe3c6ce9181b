"""scale.json: the n x F grid, and the laws of the critical capacity."""

from __future__ import annotations

from pydantic import Field

from atom_lens.evidence.results import Figures, IdentityFigures, Interval, Loss
from atom_lens.storage.schema import Result
from atom_lens.studies.cells import Kept


class Run(Result):
    """One dictionary on both splits."""

    train: Figures
    heldout: Figures
    loss: Loss | None = Field(default=None, description="with it spliced into the model, with `scale.loss_tokens`")


class Cell(Result):
    """All seeds at one n and F."""

    n: int
    capacity: int
    data: str = Field(description="`activations`, or `shuffled` for the null")
    runs: list[Run] = Field(min_length=1)
    identity: IdentityFigures | None = None

    def mean(self, split: str, key: str) -> float:
        """Mean over seeds."""
        return sum(getattr(getattr(run, split), key) for run in self.runs) / len(self.runs)


class Row(Kept):
    """All cells of one n."""

    cells: list[Cell] = Field(min_length=1)


class Point(Result):
    """The critical capacity at one n."""

    n: int
    capacity: float


class Law(Result):
    """The critical capacity F_c(n) = factor n^exponent at one level of R²; None where fewer than 3 n reach it."""

    data: str
    split: str
    level: float
    of: int = Field(description="how many n there are")
    points: list[Point]
    exponent: float | None = None
    exponent_interval: Interval | None = None
    factor: float | None = None


class Growth(Result):
    """What more activations gain, held-out, at one capacity: limit - factor n^-exponent, by least squares.

    None where fewer than 4 numbers of activations exceed the capacity: below it activations are memorised.
    """

    data: str
    key: str = Field(description="`r2` or `r2_aip`")
    capacity: int
    n: list[int] = Field(description="numbers of activations that it is fitted to")
    limit: float | None = None
    factor: float | None = None
    exponent: float | None = None


class Grid(Result):
    """One hook."""

    d_in: int
    cells: list[Cell] = Field(min_length=1)
    laws: list[Law]
    growth: list[Growth] = []


class Scaling(Result):
    """The content of scale.json."""

    schema_version: int = 1
    model: str
    hooks: dict[str, Grid] = Field(min_length=1)
    versions: dict[str, str]
