"""Where units stand: R² against q* of everything that was measured, and both over the layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from atom_lens.dictionaries import kind
from atom_lens.studies.page.charts import (
    ATOMS,
    LEAST,
    QUIET,
    SERIES,
    figure,
    mark,
    note_below,
    reach,
    value_of,
)
from atom_lens.studies.page.folders import Folder


class Unit(NamedTuple):
    """One dictionary, or several of one kind: what it is called, drawn with, and its figures by split, a run each."""

    name: str
    symbol: str
    color: str
    dash: str
    detail: str
    runs: list[Mapping[str, Any]]
    null: bool


def units_of(folder: Folder, number: int | None = None) -> Iterator[tuple[str, Unit]]:
    """(hook, unit) of everything in a run or a comparison that has an R² and a q*.

    Where a page is about several folders, `number` is which one this is: units of a run then have its name and colour.
    """
    prefix = "" if number is None else f"{folder.name}, "
    color = ATOMS if number is None else SERIES[number % len(SERIES)]
    quiet = QUIET if number is None else color
    for hook, report in folder.reports.items():
        yield hook, Unit(f"{prefix}atoms", "star", color, "solid", "", [report], False)
        for key, null in report["nulls"].items():
            one = kind(f"null_{key}")
            yield hook, Unit(prefix + one.label, one.symbol, quiet, one.dash, "", [null], True)
    for hook, found in folder.studies.get("compare", {}).get("hooks", {}).items():
        for cell in found["cells"]:
            one = kind(cell["unit"])
            look = (one.label, one.symbol, one.color, one.dash, one.asked(cell["level"]))
            yield hook, Unit(*look, cell["runs"], one.role == "null")


def plane(units: Sequence[Unit], key: str, label: str) -> go.Figure:
    """Every unit as points, held-out filled and train hollow; runs of one name share a legend entry."""
    made = figure("stability q*", label)
    named: set[str] = set()
    qs: list[float] = []
    r2s: list[float] = []
    for unit in units:
        for split in ("train", "heldout"):
            runs = [run[split] for run in unit.runs if run.get(split)]
            if not runs:
                continue
            x, y = [run["q_star"] for run in runs], [value_of(run, key) for run in runs]
            qs, r2s = qs + x, r2s + y
            shown = split == "heldout" or not unit.runs[0].get("heldout")
            made.add_scatter(
                x=x,
                y=y,
                mode="markers",
                name=unit.name,
                legendgroup=unit.name,
                showlegend=shown and unit.name not in named,
                marker=mark(unit.symbol, unit.color, split, 12 if unit.symbol.startswith("star") else 9),
                customdata=[[run["l0"]["mean"], run["n"]] for run in runs],
                hovertemplate=f"<b>%{{fullData.name}}</b> {unit.detail}<br>{split.replace('heldout', 'held-out')}: "
                f"{label} %{{y:.4f}}, q* %{{x:.4f}}<br>"
                "L0 %{customdata[0]:.1f}, n = %{customdata[1]}<extra></extra>",
            )
            if shown:
                named.add(unit.name)
    note_below(made, r2s)
    made.update_xaxes(range=reach(qs, 0.0, 1.0))
    made.update_yaxes(range=reach([*r2s, 0.0], LEAST, 1.0), zeroline=True)
    return made


def layers(units: Mapping[int, Sequence[Unit]], key: str, label: str) -> go.Figure:
    """A line per unit over the layers, means over seeds: held-out in full, train thin and hollow, nulls dashed."""
    made = figure("layer", label)
    values: list[float] = []
    names = dict.fromkeys(unit.name for here in units.values() for unit in here)
    for name in names:
        found = {layer: unit for layer, here in units.items() for unit in here if unit.name == name}
        first = next(iter(found.values()))
        for split in ("heldout", "train"):
            points = [(layer, _mean(unit, split, key)) for layer, unit in found.items() if unit.runs[0].get(split)]
            if not points or (first.null and split == "train"):
                continue
            x, y = zip(*points, strict=True)
            values += y
            held = split == "heldout"
            made.add_scatter(
                x=x,
                y=y,
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=held,
                line={"color": first.color, "dash": first.dash if held else "dot", "width": 2.4 if held else 1.4},
                marker=mark(first.symbol, first.color, split, 8),
                hovertemplate=f"layer %{{x}}: {label} %{{y:.4f}}<extra>%{{fullData.name}}, "
                f"{split.replace('heldout', 'held-out')}</extra>",
            )
    made.update_xaxes(tickmode="array", tickvals=list(units))
    made.update_yaxes(range=reach([*values, 0.0] if key == "r2" else values, LEAST, 1.0), zeroline=True)
    note_below(made, values)
    return made


def _mean(unit: Unit, split: str, key: str) -> float:
    return float(np.mean([value_of(run[split], key) for run in unit.runs]))


def by_layer(folder: Folder) -> dict[str, dict[int, list[Unit]]]:
    """Title -> layer -> units, for each kind of hook that is there for consecutive layers.

    A comparison has a set of curves for each sparsity that was asked for; what nobody asks a sparsity of, neurons and
    features, is in all of them.
    """
    found: dict[str, dict[str, dict[int, list[Unit]]]] = {}
    for hook, unit in units_of(folder):
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
        if match:
            of_kind = found.setdefault(match[2], {})
            of_kind.setdefault(unit.detail, {}).setdefault(int(match[1]), []).append(unit)
    sets: dict[str, dict[int, list[Unit]]] = {}
    for at, by_detail in found.items():
        whole = {
            detail: here
            for detail, here in by_detail.items()
            if len(here) > 1 and max(here) - min(here) == len(here) - 1
        }
        every = by_detail.get("", {})
        for detail, here in whole.items():
            if detail:
                sets[f"{folder.name}, {at}, {detail}"] = {n: [*here[n], *every.get(n, [])] for n in sorted(here)}
            elif len(whole) == 1:
                sets[f"{folder.name}, {at}"] = dict(sorted(here.items()))
    return sets
