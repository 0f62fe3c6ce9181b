"""The page about any number of folders: reads their results and joins parts with the same title."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atom_lens.errors import AtomLensError
from atom_lens.storage.schema import Result
from atom_lens.storage.terminal import say
from atom_lens.storage.text import read_text
from atom_lens.studies.report.browsers import Browser, open_browsers
from atom_lens.studies.study import STUDIES, Part
from atom_lens.studies.train.result import RunReport
from atom_lens.views.page import About, Section, save


@dataclass(frozen=True)
class Folder:
    """A folder of a run or a study.

    Attributes:
        path: as it was given.
        name: its name on the page.
        recipe: its recipe.yaml as text; empty if there is none.
        results: its results, by the name of the study.
    """

    path: Path
    name: str
    recipe: str
    results: dict[str, Result]

    @property
    def versions(self) -> dict[str, str]:
        """The versions that it was measured with."""
        first: Any = next(iter(self.results.values()))
        return next(iter(first.hooks.values())).versions if isinstance(first, RunReport) else first.versions


def read_folders(runs: Sequence[str | Path]) -> list[Folder]:
    """The folders at `runs`; those with the same name are called by their paths.

    Raises:
        AtomLensError: no folder is given, one holds neither a run nor a study, or files are damaged.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        raise AtomLensError(f"runs is empty, a page needs at least one folder of {', '.join(STUDIES)}")
    names = [path.resolve().name for path in paths]
    return [_read(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Folder:
    found = {study: path / one.file for study, one in STUDIES.items() if (path / one.file).is_file()}
    if not found:
        raise AtomLensError(
            f"{str(path)!r} has nothing that a page can show, allowed are folders that hold a "
            f"{' or '.join(one.file for one in STUDIES.values())}"
        )
    recipe = path / "recipe.yaml"
    results = {study: STUDIES[study].result.read(file) for study, file in found.items()}
    return Folder(path, name, read_text(recipe) if recipe.is_file() else "", results)


def write_page(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write one HTML file about `runs`; it contains its scripts and data, and opens from disk without a network.

    Args:
        runs: folders of `train` and of studies, any number of any kind.
        out: the file; None is report.html in the parent folder of the first run.

    Returns:
        The file.

    Raises:
        AtomLensError: a folder that is none of these, or damaged files.
    """
    folders = read_folders(runs)
    path = Path(runs[0]).resolve().parent / "report.html" if out is None else Path(out)
    command = ["atom-lens", "report", *map(str, runs), *([] if out is None else ["--out", str(out)])]
    abouts = [About(folder.name, folder.recipe, folder.versions) for folder in folders]
    title = ", ".join(folder.name for folder in folders)
    save(path, title, sections_of(folders), abouts, shlex.join(command))
    return path


def sections_of(folders: Sequence[Folder]) -> list[Section]:
    """The parts of all results, joined by title, then the atoms of runs."""
    parts: list[Part] = []
    for folder in folders:
        for name, result in folder.results.items():
            parts += STUDIES[name].show(result, folder.name)
    found = [one for folder in folders if isinstance(folder.results.get("train"), RunReport) for one in _open(folder)]
    browsers = {one.label: one.atoms for one in found if isinstance(one, Browser)}
    missing = " ".join(one for one in found if isinstance(one, str))
    sections = joined(parts)
    if browsers or missing:
        intro = "Every atom, with the contexts it fires on most strongly, in the training split and held-out."
        sections.append(Section("Atoms", f"{intro * bool(browsers)} {missing}".strip(), browsers=browsers))
    return sections


def _open(folder: Folder) -> list[Browser | str]:
    result = folder.results["train"]
    assert isinstance(result, RunReport)
    return list(open_browsers(folder.path, folder.name, result))


def joined(parts: Sequence[Part]) -> list[Section]:
    """A section for each title."""
    return [_joined(title, parts) for title in dict.fromkeys(part.title for part in parts)]


def _joined(title: str, parts: Sequence[Part]) -> Section:
    """Join the parts of one title: panels with the same title become one, with the choices of all."""
    here = [part for part in parts if part.title == title]
    panels = {}
    for panel in (panel for part in here for panel in part.panels):
        kept = panels.setdefault(panel.title, (panel.caption, {}))
        kept[1].update(panel.draws)
    intro = next((part.intro for part in here if part.intro), "")
    return Section(title, intro, panels, [table for part in here for table in part.tables])


def command(*runs: str, out: Path | None = None) -> None:
    """Write one HTML file about runs and studies: plots, tables, an atoms browser; it needs no network.

    Example: atom-lens report runs/quickstart runs/compare

    Args:
        runs: run folders of train, folders of compare, scale, ...
        out: the file (default: report.html in the first folder's parent)
    """
    say(f"written to {write_page(runs, out)}")
