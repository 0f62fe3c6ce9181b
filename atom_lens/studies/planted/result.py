"""planted.json: the theorem, its decay, and what trained dictionaries find."""

from __future__ import annotations

from pydantic import Field

from atom_lens.storage.schema import Result


class TheoremFound(Result):
    """Wrong codes inside the window and beyond each of its ends."""

    dictionaries: int
    codes: int = Field(description="of each dictionary")
    window: list[float] = Field(description="of the last dictionary")
    wrong: dict[str, int] = Field(description="codes whose support was misread, by where the threshold lies")


class Level(Result):
    """Codes read exactly at one level of noise, or of the gap between amplitudes."""

    level: float
    window: float = Field(description="by how much it is open; below 0 it is shut")
    tau: float
    exact: float = Field(description="share of codes read exactly")


class Mark(Result):
    """A kind against the truth, means over seeds."""

    unit: str
    mcc: float = Field(description="mean coherence of planted atoms with their partners, planted metric")
    f1: float = Field(description="of supports")
    exact: float = Field(description="share of codes whose support is exactly the planted one")
    l0: float


class PlantedFound(Result):
    """What planted.json holds."""

    schema_version: int = 1
    theorem: TheoremFound
    decay: dict[str, list[Level]] = Field(description="`noise` and `gap`")
    learning: list[Mark] = []
    versions: dict[str, str]
