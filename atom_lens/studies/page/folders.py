"""What a page is made of: folders of `train`, and of studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atom_lens.evidence.report import SCHEMA_VERSION
from atom_lens.storage.files import read_json, shown
from atom_lens.storage.text import read_text
from atom_lens.studies.page.shapes import STUDIES, Report, checked

_STUDY_VERSION = 1


@dataclass(frozen=True)
class Folder:
    """One RUN.

    Attributes:
        path: as it was given.
        name: what the page calls it.
        recipe: its recipe.yaml, as text.
        reports: hook -> report, of a run of `train`; empty for a study.
        studies: what compare.json, intervene.json and scale.json hold, by the name of their command.
    """

    path: Path
    name: str
    recipe: str
    reports: dict[str, dict[str, Any]]
    studies: dict[str, dict[str, Any]]

    @property
    def model(self) -> str:
        """What it is about."""
        return str(self._any.get("model"))

    @property
    def versions(self) -> dict[str, str]:
        """Of what measured it."""
        return self._any["versions"]

    @property
    def _any(self) -> dict[str, Any]:
        return next(iter([*self.reports.values(), *self.studies.values()]))


def read_folders(runs: Sequence[str | Path]) -> list[Folder]:
    """The folders at `runs`; two of one name are called by their paths.

    Raises:
        ValueError: no folder is given, or one holds neither a run nor a study, or files that are damaged.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        raise ValueError("runs is empty, a page needs at least one folder of train, compare, intervene or scale")
    names = [path.resolve().name for path in paths]
    return [_read(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Folder:
    recipe = path / "recipe.yaml"
    has_run = recipe.is_file() and (path / "report.json").is_file()
    files = {study: path / f"{study}.json" for study in STUDIES if (path / f"{study}.json").is_file()}
    studies = {name: checked(file, read_json(file), _STUDY_VERSION, STUDIES[name]) for name, file in files.items()}
    if not has_run and not studies:
        raise ValueError(
            f"{str(path)!r} is no folder that a page can be made of, allowed are folders of train (recipe.yaml and "
            "report.json) and those that hold a compare.json, intervene.json or scale.json"
        )
    reports = _reports(path / "report.json") if has_run else {}
    text = read_text(recipe) if recipe.is_file() else ""
    return Folder(path, name, text, reports, studies)


def _reports(file: Path) -> dict[str, dict[str, Any]]:
    """hook -> report: a run of one hook is its report, of several it holds theirs."""
    found = read_json(file)
    hooks = found["hooks"] if "hooks" in found else {str(found.get("hook")): found}
    if not isinstance(hooks, dict) or not hooks:
        raise ValueError(f"{str(file)!r} is damaged: key hooks is {shown(hooks)}, allowed is a report for each hook")
    return {hook: checked(file, report, SCHEMA_VERSION, Report) for hook, report in hooks.items()}
