"""What is read from files: typed, and refused where it is anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from atom_lens.storage.files import shown

Positive = Annotated[float, Field(gt=0)]
# What torch, numpy and scikit-learn all take, with room for those derived from it: seed + 1, seed + 2, ...
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Unknown keys, wrong types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Section(Strict):
    """A part of a recipe: lists hold nothing twice."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Section:
        for name, value in self:
            for one in value if isinstance(value, list) else ():
                if isinstance(one, str | float | int) and value.count(one) > 1:
                    raise PydanticCustomError("twice", "{name} has {one} twice", {"name": name, "one": repr(one)})
        return self


AnyStrict = TypeVar("AnyStrict", bound=Strict)


def parsed(kind: type[AnyStrict], data: Any, path: Path) -> AnyStrict:
    """`data`, read from `path`, as a `kind`; the first thing wrong with it is a ValueError of one sentence."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        said = f"key {shown(key)} is {shown(problem['input'])}: {shown(problem['msg'])}"
        raise ValueError(f"{str(path)!r}: {said}") from None
