"""Recipes as files: read, overridden, checked and written; any fault of one is reported in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from atom_lens.activations.prompts import SOURCES
from atom_lens.errors import AtomLensError
from atom_lens.recipe.recipe import Recipe, recipe_type
from atom_lens.recipe.shipped import find_recipe
from atom_lens.recipe.yaml import read_yaml, write_yaml
from atom_lens.storage.schema import Section
from atom_lens.storage.text import read_text

AnySection = TypeVar("AnySection", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, a file or the package's own by name, and apply ``section.key=value`` overrides (values in YAML).

    Raises:
        AtomLensError: no such file, not YAML, an unknown key, a wrong type or a value that is not allowed; one
            sentence that names the key, the value and what is allowed.
    """
    return load_section(recipe_type(), path, overrides)


def load_section(kind: type[AnySection], path: str | Path, overrides: Sequence[str] = ()) -> AnySection:
    """Any kind of recipe, as `load_recipe` reads one."""
    path = find_recipe(path)
    text = read_text(path)
    try:
        data = read_yaml(text)
    except ValueError as error:
        raise AtomLensError(f"{path} is not YAML as recipes are written: {error}") from error
    if not isinstance(data, dict):
        raise AtomLensError(f"{path} holds a {type(data).__name__}, a recipe is a mapping")
    given: set[str] = set()
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise AtomLensError(f"override {override!r} is not of the form section.key=value")
        if key in given:
            raise AtomLensError(f"override {key!r} is given twice")
        if lost := next((one for one in given if one.startswith(f"{key}.")), None):
            raise AtomLensError(f"override {key!r} replaces what override {lost!r} set: give it first")
        given.add(key)
        node = data
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise AtomLensError(f"override {override!r} reaches into {parent!r}, which is not a section")
        try:
            node[last] = read_yaml(value)
        except ValueError as error:
            raise AtomLensError(f"override {override!r} has a value that is not YAML: {error}") from error
    return checked(kind, data, str(path))


def check_recipe(data: Any, where: str = "the recipe") -> Recipe:
    """A recipe from plain data; raises AtomLensError with one sentence about the first thing wrong."""
    return checked(recipe_type(), data, where)


def checked(kind: type[AnySection], data: Any, where: str) -> AnySection:
    """`data` as a section; an AtomLensError says in one sentence the first thing that is wrong, and `where`."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise AtomLensError(f"{where}: {_sentence(error, kind)}") from None


def dump_recipe(recipe: Section) -> str:
    """The recipe as YAML, with every default written out."""
    return write_yaml(recipe.model_dump())


def _sentence(error: ValidationError, kind: type[Section]) -> str:
    # A misspelt key is also a missing one: name the misspelling.
    problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # A union's location holds the tag of the member: prompts.cities.limit is written prompts.limit in the file.
    tags = (*SOURCES, "float", "constrained-float", "literal['oas']")
    location = [str(part) for part in problem["loc"] if str(part) not in tags]
    key = ".".join(location) or "the recipe"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}" if near else f"allowed are {', '.join(known)}"
        return f"key {key} is unknown, {hint}"
    if problem["type"] == "twice":
        return f"key {'.'.join([*location, problem['msg']])}"
    if problem["type"] == "missing":
        return f"key {key} is missing"
    if problem["type"].startswith("union_tag"):
        return f"key {key}.source is {_shown(problem['input'])}, allowed are {', '.join(SOURCES)}"
    if problem["type"] == "value_error":  # from a validator of ours: a sentence already
        return str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
    allowed = problem["msg"].removeprefix("Input should be ")
    return f"key {key} is {_shown(problem['input'])}, allowed is {allowed}"


def _shown(value: Any) -> str:
    text = repr(value.get("source") if isinstance(value, dict) and "source" in value else value)
    return text if len(text) < 80 else text[:77] + "..."


def _known_keys(kind: type[Section], location: tuple[int | str, ...]) -> list[str]:
    section: Any = kind
    for part in location:
        if part in SOURCES:
            section = SOURCES[str(part)]
        elif str(part) in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            options = [annotation, *get_args(annotation)]  # Training | None stands for Training
            section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), section)
    return list(section.model_fields)
