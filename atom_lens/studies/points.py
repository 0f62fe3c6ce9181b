"""Plots of measured dictionaries: R² against q*, both over the layers of a model, and both over L0."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from atom_lens.dictionaries.registry import Kind
from atom_lens.evidence.results import Figures, NullFigures
from atom_lens.views.plot import LEAST, Draw, log_ticks, plain, points, r2_axis

LABELS = {"r2": "R²", "r2_aip": "R² (AIP)", "q_star": "q*"}
SPLITS = {"heldout": "held-out", "train": "train"}


def value(figures: Figures, key: str) -> float:
    """R² (for a drawn null its best), R² (AIP) or q* of a split."""
    return figures.best_r2 if key == "r2" and isinstance(figures, NullFigures) else getattr(figures, key)


class Measured(NamedTuple):
    """Dictionaries of one kind from one or several seeds: the kind, the level asked for, and the splits of each run."""

    kind: Kind
    asked: str
    runs: Sequence[Mapping[str, Figures]]

    @property
    def null(self) -> bool:
        return self.kind.role == "null"


def plane(measured: Sequence[Measured], key: str) -> Draw:
    """R² against q*: every dictionary on both splits, held-out filled, train hollow."""

    def draw(axes: Axes) -> None:
        every = []
        for one in measured:
            for split in ("train", "heldout"):
                found = [run[split] for run in one.runs if split in run]
                if not found:
                    continue
                x, y = [each.q_star for each in found], [value(each, key) for each in found]
                every += y
                alone = all("heldout" not in run for run in one.runs)
                label = one.kind.label if split == "heldout" or alone else "_"
                points(axes, x, y, label=label, color=one.kind.color, marker=one.kind.marker, hollow=split == "train")
        r2_axis(axes, every)
        axes.set(xlabel="stability q*", ylabel=LABELS[key])

    return draw


def layers(by_layer: Mapping[int, Sequence[Measured]], key: str) -> Draw:
    """A line per kind over the layers, means over seeds; training values dotted and hollow, nulls only held-out."""

    def draw(axes: Axes) -> None:
        every: list[float] = []
        kinds = {one.kind.name: one.kind for here in by_layer.values() for one in here}
        for name, kind in kinds.items():
            for split in ("heldout", "train") if kind.role != "null" else ("heldout",):
                at = {
                    layer: float(np.mean([value(run[split], key) for run in one.runs]))
                    for layer, here in by_layer.items()
                    for one in here
                    if one.kind.name == name and all(split in run for run in one.runs)
                }
                if not at:
                    continue
                every += at.values()
                held = split == "heldout"
                axes.plot(
                    list(at),
                    [max(one, LEAST) for one in at.values()],
                    label=plain(kind.label) if held else None,
                    color=kind.color,
                    linestyle=kind.line if held else ":",
                    linewidth=2 if held else 1,
                    marker=kind.marker,
                    markersize=6,
                    markerfacecolor=kind.color if held else "none",
                )
        axes.set(xlabel="layer", ylabel=LABELS[key])
        axes.set_xticks(list(by_layer))
        if key == "q_star":
            axes.set_ylim(min([*every, 0.9]) - 0.03, 1.03)
        else:
            r2_axis(axes, every)

    return draw


def over_l0(measured: Sequence[Measured], key: str) -> Draw:
    """A line per kind over the mean L0 of its codes, held-out, means over seeds."""

    def draw(axes: Axes) -> None:
        every: list[float] = []
        seen: list[float] = []
        for kind in {one.kind.name: one.kind for one in measured}.values():
            at = sorted(
                (
                    float(np.mean([one["heldout"].l0.mean for one in runs])),
                    float(np.mean([value(one["heldout"], key) for one in runs])),
                )
                for runs in ([run for run in one.runs if "heldout" in run] for one in measured if one.kind is kind)
                if runs
            )
            every += [y for _, y in at]
            seen += [x for x, _ in at]
            axes.plot(
                [x for x, _ in at],
                [max(y, LEAST) for _, y in at],
                label=plain(kind.label),
                color=kind.color,
                linestyle=kind.line,
                marker=kind.marker,
                markersize=7,
            )
        axes.set_xscale("log")
        axes.set(xlabel="L0", ylabel=LABELS[key])
        if seen:
            low, high = np.log2(min(seen)), np.log2(max(seen))
            log_ticks(axes.xaxis, [2.0**n for n in range(math.floor(low), math.ceil(high) + 1)])
            axes.set_xlim(2 ** (low - 0.2), 2 ** (high + 0.2))
        if key != "q_star":
            r2_axis(axes, every)

    return draw


def over_layers(hooks: Mapping[str, Sequence[Measured]]) -> dict[str, dict[int, list[Measured]]]:
    """What was measured at several layers: hook without its layer, and level asked for -> layer -> measured.

    Kinds without a level, neurons and pretrained features, are in every one of them.
    """
    found: dict[tuple[str, str], dict[int, list[Measured]]] = {}
    free: dict[str, dict[int, list[Measured]]] = {}
    for hook, measured in hooks.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook):
            layer, at = int(match[1]), match[2]
            for one in measured:
                into = found.setdefault((at, one.asked), {}) if one.asked else free.setdefault(at, {})
                into.setdefault(layer, []).append(one)
    if not found:
        found = {(at, ""): here for at, here in free.items()}
        free = {}
    return {
        f"{at}, {asked}" if asked else at: {n: [*here[n], *free.get(at, {}).get(n, [])] for n in sorted(here)}
        for (at, asked), here in found.items()
        if len(here) > 1
    }
