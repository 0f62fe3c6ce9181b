"""What is written and read as JSON or YAML: typed, and refused where it is anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import read_json, shown, write_json

Positive = Annotated[float, Field(gt=0)]
# What torch, numpy and scikit-learn all take, with room for those derived from it: seed + 1, seed + 2, ...
Seed = Annotated[int, Field(ge=0, lt=2**31)]

AnyResult = TypeVar("AnyResult", bound="Result")
AnyStrict = TypeVar("AnyStrict", bound="Strict")


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


class Result(BaseModel):
    """What was measured: the type that is written as JSON is the one that checks it when it is read.

    Reads like the JSON, too: ``report["heldout"]["r2"]`` is ``report.heldout.r2``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).model_fields and key not in (self.model_extra or ()):
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in type(self).model_fields or key in (self.model_extra or ()))

    def get(self, key: str, default: Any = None) -> Any:
        """The field `key`, or `default` where there is none."""
        return getattr(self, key) if key in self else default

    def write(self, path: Path) -> None:
        """Write strict JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls: type[AnyResult], path: Path) -> AnyResult:
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: nothing is there.
            AtomLensError: it is damaged, or of another version.
        """
        return cls.checked(read_json(path), path)

    @classmethod
    def checked(cls: type[AnyResult], found: Any, path: Path) -> AnyResult:
        """`found`, read from `path`, as this type; an AtomLensError names what is wrong with it."""
        if not isinstance(found, dict):
            raise AtomLensError(f"{str(path)!r} is damaged: it has {shown(found)} where a mapping is needed")
        version = cls.model_fields.get("schema_version")
        if version is not None and found.get("schema_version") != version.default:
            raise AtomLensError(
                f"{str(path)!r} has schema_version {shown(found.get('schema_version'))}, this version of atom-lens "
                f"reads {version.default}: measure again"
            )
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise AtomLensError(f"{str(path)!r} is damaged: key {key}, {problem['msg'].lower()}") from None


def parsed(kind: type[AnyStrict], data: Any, path: Path) -> AnyStrict:
    """`data`, read from `path`, as a `kind`; the first thing wrong with it is an AtomLensError of one sentence."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        said = f"key {shown(key)} is {shown(problem['input'])}: {shown(problem['msg'])}"
        raise AtomLensError(f"{str(path)!r}: {said}") from None
