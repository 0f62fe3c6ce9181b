"""A study: a command that turns a recipe into a typed result, and how a reader sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from atom_lens.storage.files import check_writable, replacing, visible
from atom_lens.storage.schema import Result
from atom_lens.storage.terminal import is_quiet, say
from atom_lens.views.plot import Panel, save_png
from atom_lens.views.table import Table

AnyResult = TypeVar("AnyResult", bound=Result)


@dataclass(frozen=True)
class Part:
    """A part of what a reader sees: the page joins parts with the same title, a terminal shows their tables."""

    title: str
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    intro: str = ""


@dataclass(frozen=True, kw_only=True)
class Study(Generic[AnyResult]):
    """What a study writes and how it is shown.

    Attributes:
        name: of its command.
        result: the type of its result.
        file: the name of the result in its folder; <name>.json by default.
        show: makes its parts, given the result and the name of its folder.
        tables: further files in its folder: name -> table, written as CSV.
    """

    name: str
    result: type[AnyResult]
    file: str = ""
    show: Callable[[AnyResult, str], list[Part]]
    tables: Callable[[AnyResult], Mapping[str, Table]] = field(default=lambda result: {})

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", self.file or f"{self.name}.json")

    def keep(self, result: AnyResult, folder: Path) -> None:
        """Write a result, its tables as CSV, and a picture for each choice that the reader has (a hook)."""
        result.write(folder / self.file)
        for name, table in self.tables(result).items():
            with replacing(folder / name) as temporary:
                temporary.write_text(table.csv(), encoding="utf-8")
        panels = [panel for part in self.show(result, folder.name) for panel in part.panels]
        for choice in dict.fromkeys(name for panel in panels for name in panel.draws):
            chosen = [(panel.title, panel.draws[choice]) for panel in panels if choice in panel.draws]
            name = visible(choice).replace("/", "-").replace(" ", "-") or self.name
            save_png(chosen, folder / f"{name}.png", choice)

    def text(self, result: AnyResult, name: str) -> str:
        """What a terminal shows."""
        return "\n\n".join(table.text() for part in self.show(result, name) for table in part.tables)


def recipe_command(study: Study[AnyResult], run: Callable[..., Path], example: str) -> Callable[..., None]:
    """The command of a study that turns a recipe into a folder.

    Args:
        study: says what the folder holds.
        run: (recipe file, overrides, out) -> the folder.
        example: an example call, for the help.
    """

    def command(recipe: str, /, *overrides: str, out: Path = Path("runs"), json: Path | None = None) -> None:
        for option in filter(None, [json]):
            check_writable("--json", option)
        folder = run(recipe, overrides, out)
        if is_quiet() and json is None:
            return
        result = study.result.read(folder / study.file)
        if json is not None:
            result.write(json)
        say(f"{study.text(result, folder.name)}\n\nwritten to {folder}")

    command.__doc__ = _HELP.format(summary=summary_of(run), example=example)
    return command


_HELP = """{summary}

Example: {example}

Args:
    recipe: YAML file, or the name of one that `atom-lens recipes` lists
    overrides: change a key of the recipe, e.g. atoms.target_l0=4 model.device=cuda
    out: folder of run folders
    json: also write the result to this file
"""


def summary_of(function: Callable[..., Any]) -> str:
    """The first line of a module's docstring."""
    module = sys.modules[function.__module__]
    package = sys.modules.get(function.__module__.removesuffix(".run"), module)
    return (package.__doc__ or "").strip().splitlines()[0]


STUDIES: dict[str, Study[Any]] = {}


def register(study: Study[AnyResult]) -> Study[AnyResult]:
    """Add a study to the command line and the page, and let `print` show its result as the terminal does."""
    STUDIES[study.name] = study
    setattr(study.result, "__str__", lambda result: study.text(result, study.name))  # noqa: B010 -- no method is known
    return study
