"""Writing the page: all that it needs goes into one file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from atom_lens._version import __version__
from atom_lens.storage.files import replacing, visible
from atom_lens.studies.page.folders import Folder, read_folders
from atom_lens.studies.page.sections import sections_of


def write_page(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write one HTML file about `runs`; it holds its scripts and data, and opens from disk without a network.

    Args:
        runs: folders of `train`, and of studies (compare.json, intervene.json, scale.json), of any kind and number.
        out: the file; None is report.html in the parent folder of the first run.

    Returns:
        The file.

    Raises:
        ValueError: a folder that is none of these, or damaged files.
    """
    folders = read_folders(runs)
    path = Path(runs[0]).resolve().parent / "report.html" if out is None else Path(out)
    text = _html(folders, _command(runs, out))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair is no UTF-8
    return path


def _command(runs: Sequence[str | Path], out: Path | None) -> str:
    return shlex.join(["atom-lens", "report", *map(str, runs), *([] if out is None else ["--out", str(out)])])


def _html(folders: Sequence[Folder], command: str) -> str:
    assets = files("atom_lens.studies.page") / "assets"
    read = {asset.name: asset.read_text(encoding="utf-8") for asset in assets.iterdir()}
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return environment.from_string(read["page.html"]).render(
        title=", ".join(folder.name for folder in folders),
        sections=sections_of(folders),
        folders=folders,
        command=command,
        version=__version__,
        assets=read,
        plotly=get_plotlyjs(),
        plain=_plain,
        visible=_visible,
    )


def _visible(value: Any) -> Any:
    """Texts are shown as they are, lines and all; what is markup or JSON by now, and numbers, are as they are."""
    return visible(value, keep="\n\t") if type(value) is str else value


def _plain(figure: go.Figure) -> Any:
    """What JSON holds of a figure: numbers in plotly's compact base64, and names, where it takes markup, as text."""
    plain = json.loads(str(figure.to_json()))
    for trace in plain["data"]:
        if "name" in trace:
            trace["name"] = escape(visible(trace["name"]), quote=False)
    return plain
