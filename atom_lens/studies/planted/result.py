"""planted.json: the theorem, its decay, and what trained dictionaries find."""

from __future__ import annotations

from pydantic import Field

from atom_lens.storage.schema import Result
from atom_lens.studies.cells import Kept


class TheoremFound(Result):
    """Wrong codes inside the window and beyond each of its ends."""

    dictionaries: int
    codes: int = Field(description="of each dictionary")
    window: list[float] = Field(description="of the last dictionary")
    wrong: dict[str, int] = Field(description="codes whose support was misread, by the place of the threshold")


class Level(Result):
    """Codes read exactly at one level of noise, or of the gap between amplitudes."""

    level: float
    window: float = Field(description="how far it is open; below 0 it is shut")
    tau: float
    exact: float = Field(description="share of codes read exactly")


class Mark(Result):
    """The scores of a dictionary under an encoder, means over seeds."""

    kind: str
    encoder: str = Field(
        description="`own`; `refit`: its choice of atoms, least-squares coefficients; `fixed`: a pursuit with the same "
        "number of atoms for every row; `threshold`: a threshold-activated pursuit of the true mean L0"
    )
    mcc: float = Field(description="mean coherence of planted atoms with their partners, planted metric")
    f1: float = Field(description="of supports")
    exact: float = Field(description="share of codes whose support is exactly the planted one")
    l0: float
    r2: float = Field(description="held-out")
    r2_aip: float = Field(description="held-out, under the metric of the training activations")

    def above(self, truth: Mark) -> bool:
        """Whether it explains more than the true atoms do, which is a symptom and not a success."""
        return self.r2 > truth.r2 + 0.005 or self.r2_aip > truth.r2_aip + 0.005


class Marks(Kept):
    """A kind under its encoders."""

    marks: list[Mark]


class Learned(Result):
    """How well kinds find atoms planted in one way."""

    l0: float = Field(description="mean number of atoms planted in a row")
    coherence: float = Field(description="the largest coherence of two planted atoms, planted metric")
    window: float = Field(description="how far the threshold window is open at the largest K; below 0 it is shut")
    truth: list[Mark] = Field(description="the planted atoms themselves: the ceiling")
    marks: list[Mark]


class PlantedFound(Result):
    """The content of planted.json."""

    schema_version: int = 3
    theorem: TheoremFound
    decay: dict[str, list[Level]] = Field(description="`noise` and `gap`")
    learning: dict[str, Learned] = Field(default={}, description="by the name of the setting")
    versions: dict[str, str]
