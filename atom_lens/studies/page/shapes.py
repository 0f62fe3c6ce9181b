"""What a page leans on in the JSON of runs and studies: a damaged file is refused by name before it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from atom_lens.storage.files import shown


class _L0(BaseModel):
    mean: float


class _Split(BaseModel):
    n: int
    r2: float
    r2_aip: float
    q_star: float
    l0: _L0
    dead_atoms: int


class _Run(BaseModel):
    train: _Split
    heldout: _Split | None = None


class _Drawn(_Split):
    r2_euclidean_pursuit: float


class _Null(BaseModel):
    train: _Drawn


class _Nulls(BaseModel):
    random: _Null
    data: _Null
    frozen: _Run | None = None
    shuffled: _Run | None = None


class Report(_Run):
    """A report of `train`."""

    n: int
    d_sae: int
    n_over_f: float
    nulls: _Nulls
    versions: dict[str, str]


class _Study(BaseModel):
    model: str
    versions: dict[str, str]


_Runs = Annotated[list[_Run], Field(min_length=1)]


class _Unit(BaseModel):
    unit: str
    level: float | None
    runs: _Runs
    identity: dict[str, Any] | None


class _Units(BaseModel):
    n: int
    n_heldout: int
    d_sae: int
    n_over_f: float
    cells: list[_Unit] = Field(min_length=1)


class _Compare(_Study):
    hooks: dict[str, _Units] = Field(min_length=1)


class _Trained(BaseModel):
    n: int
    capacity: int
    data: str
    runs: _Runs


class _Grid(BaseModel):
    cells: list[_Trained] = Field(min_length=1)
    laws: list[dict[str, Any]]


class _Scale(_Study):
    hooks: dict[str, _Grid] = Field(min_length=1)


class _Edits(BaseModel):
    name: str
    heldout: dict[str, Any]
    swap: dict[str, dict[str, Any]]
    doses: dict[str, dict[str, Any]]
    ablate: dict[str, dict[str, Any]]


class _Intervene(_Study):
    hook: str
    n_facts: int
    n_answers: int
    class_means: dict[str, Any]
    cells: list[_Edits] = Field(min_length=1)


STUDIES: dict[str, type[BaseModel]] = {"compare": _Compare, "intervene": _Intervene, "scale": _Scale}


def checked(file: Path, found: Any, version: int, shape: type[BaseModel]) -> dict[str, Any]:
    """`found` itself, where it is of this `version` and `shape`.

    Raises:
        ValueError: it is not; one sentence that names the file.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} is damaged: it has {shown(found)} where a mapping is needed")
    if found.get("schema_version") != version:
        raise ValueError(
            f"{str(file)!r} has schema_version {shown(found.get('schema_version'))}, a page can be made of {version}: "
            "measure again with this version of atom-lens"
        )
    try:
        shape.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{str(file)!r} is damaged: key {key}, {problem['msg'].lower()}") from None
    return found
