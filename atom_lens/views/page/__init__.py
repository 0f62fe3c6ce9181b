"""The page: sections of plots, tables and atoms browsers in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from atom_lens._version import __version__
from atom_lens.storage.files import replacing, visible
from atom_lens.views.plot import Draw, svg
from atom_lens.views.table import Cell, Table


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        title: the heading.
        intro: a sentence or two.
        panels: title -> (caption, choice -> plot).
        tables: shown after the plots.
        browsers: label -> data of an atoms browser.
    """

    title: str
    intro: str = ""
    panels: Mapping[str, tuple[str, Mapping[str, Draw]]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    browsers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The id of its element, used in links."""
        return self.title.lower().replace(" ", "-")

    @property
    def choices(self) -> list[str]:
        """The choices that the reader has."""
        return list(dict.fromkeys(choice for _, draws in self.panels.values() for choice in draws))


class About(NamedTuple):
    """What a page says about one of its folders: its name, recipe and versions."""

    name: str
    recipe: str
    versions: Mapping[str, str]


def render(title: str, sections: Sequence[Section], folders: Sequence[About], command: str) -> str:
    """The HTML of a page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    assets = {
        asset.name: asset.read_text(encoding="utf-8")
        for asset in files(__name__).iterdir()
        if asset.name.endswith((".html", ".css", ".js"))
    }
    return environment.from_string(assets["page.html"]).render(
        title=title,
        sections=[one for one in sections if one.panels or one.tables or one.browsers or one.intro],
        folders=folders,
        command=command,
        version=__version__,
        assets=assets,
        svg=svg,
        cell=lambda one: Cell(one) if isinstance(one, str) else one,
    )


def save(path: Path, title: str, sections: Sequence[Section], folders: Sequence[About], command: str) -> None:
    """Write a page, whole or not at all."""
    text = render(title, sections, folders, command)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # for half a surrogate pair


def _visible(value: Any) -> Any:
    """Show control characters of plain texts as escapes; markup, JSON and numbers stay as they are."""
    return visible(value, keep="\n\t") if type(value) is str else value
