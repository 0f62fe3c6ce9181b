"""Sections of a recipe that dictionaries are made and trained from, and what every section is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# YAML 1.1 reads 1e-6 as text (it wants 1.0e-6): numbers may be written as people write them.
Number = Annotated[float, Field(strict=False)]
Positive = Annotated[float, Field(strict=False, gt=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys, wrong types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Atoms(Section):
    """The dictionary. `capacity` is d_sae; the rest is `TSAETrainingConfig`'s."""

    capacity: int = Field(ge=1)
    target_l0: Number = Field(gt=0)
    encoder: Literal["tied", "free"] = "free"
    start: Literal["data", "random"] = "data"
    loss_norm: Number = Field(0.75, ge=0, le=1)
    l0_coefficient: Number = Field(0.15, gt=0)
    noise: Number = Field(0.3, ge=0)
    revival: Number = Field(1 / 32, ge=0)
    bandwidth: Number = Field(0.05, gt=0)
    step: Literal["dense", "sparse"] = "sparse"
    encoder_product: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _target_fits(self) -> Atoms:
        if self.target_l0 > self.capacity:
            raise ValueError(f"atoms.target_l0 is {self.target_l0}, allowed is up to atoms.capacity={self.capacity}")
        return self


class Training(Section):
    """sae-lens' trainer. Steps, not epochs; the learning rate warms up and decays to zero linearly."""

    steps: int = Field(ge=1)
    batch_size: int = Field(256, ge=1)
    lr: Number = Field(1e-3, gt=0)
    warm_up: Number = Field(0.05, ge=0, le=1)
    decay: Number = Field(0.3, ge=0, le=1)
    dead_after: int = Field(200, ge=1, description="steps without firing after which an atom counts as dead")
    device: str = "auto"
    seed: int = 0
    seeds: int = Field(1, ge=1, description="runs from independent starts, trained in one pass")
    checkpoint_minutes: Number = Field(5.0, ge=0, description="between checkpoints that a stopped run goes on from")
    nulls: bool = Field(True, description="also train the frozen-decoder and the shuffled-coordinates null")
