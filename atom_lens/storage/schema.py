"""Types of everything written and read as JSON or YAML; anything that does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from atom_lens.errors import AtomLensError
from atom_lens.storage.files import read_json, shown, write_json

Positive = Annotated[float, Field(gt=0)]
# What torch, numpy and scikit-learn all accept, with room for seeds derived from it: seed + 1, seed + 2, ...
Seed = Annotated[int, Field(ge=0, lt=2**31)]

AnyResult = TypeVar("AnyResult", bound="Result")
AnyStrict = TypeVar("AnyStrict", bound="Strict")


class Strict(BaseModel):
    """Unknown keys, wrong types and infinities are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Section(Strict):
    """A part of a recipe: lists have no repeated values."""

    @model_validator(mode="after")
    def _nothing_twice(self) -> Section:
        for name, value in self:
            for one in value if isinstance(value, list) else ():
                if isinstance(one, str | float | int) and value.count(one) > 1:
                    raise PydanticCustomError("twice", "{name} has {one} twice", {"name": name, "one": repr(one)})
        return self


class Result(BaseModel):
    """What was measured: one type writes it as JSON and checks it when it is read.

    It can be indexed like the JSON: ``report["heldout"]["r2"]`` is ``report.heldout.r2``.
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
            FileNotFoundError: there is no such file.
            AtomLensError: it is damaged, or of another version.
        """
        return cls.checked(read_json(path), path)

    @classmethod
    def checked(cls: type[AnyResult], found: Any, path: Path) -> AnyResult:
        """`found`, read from `path`, as this type; an AtomLensError says what is wrong with it."""
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
    """`data`, read from `path`, as a `kind`; an AtomLensError says in one sentence the first thing that is wrong."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        said = f"key {shown(key)} is {shown(problem['input'])}: {shown(problem['msg'])}"
        raise AtomLensError(f"{str(path)!r}: {said}") from None
