"""Layers: the same units at many hooks, their means as in the paper's table, and curves over depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atom_lens.dictionaries import kind
from atom_lens.storage.files import replacing
from atom_lens.studies.frontier import COMPETING, MARKERS, mean_of
from atom_lens.studies.report_text import aligned

_COLUMNS = (
    ("R² train", "train", "r2"),
    ("R² held-out", "heldout", "r2"),
    ("R² (AIP) held", "heldout", "r2_aip"),
    ("q* train", "train", "q_star"),
    ("q* held-out", "heldout", "q_star"),
)


def layers_table(result: Mapping[str, Any]) -> str:
    """Means over hooks of every unit, and the lowest and highest hook of held-out R²."""
    hooks = result["hooks"]
    rows = [[f"mean over {len(hooks)} hooks", "asked", "L0 held", *(name for name, *_ in _COLUMNS), "R² held, range"]]
    rows[0].append("PW-MCC")
    for (unit, level), found in by_unit(hooks).items():
        cells = list(found.values())
        means = [np.mean([mean_of(cell, split, key) for cell in cells]) for _, split, key in _COLUMNS]
        held = [mean_of(cell, "heldout", "r2") for cell in cells]
        same = [cell["identity"]["pw_mcc"] for cell in cells if cell["identity"]]
        l0 = np.mean([mean_of(cell, "heldout", "l0", "mean") for cell in cells])
        rows.append(
            [
                kind(unit).label + of_hooks(len(cells), len(hooks)),
                "" if level is None else f"{level:g}",
                f"{l0:.1f}",
                *(f"{value:.3f}" for value in means),
                f"{min(held):.2f} to {max(held):.2f}",
                f"{np.mean(same):.3f}" if same else "",
            ]
        )
    return aligned(rows)


def draw_layers(result: Mapping[str, Any], path: Path) -> None:
    """R² and q* over the hooks, training on the left, held-out on the right; nulls and controls dotted."""
    from matplotlib.figure import Figure

    hooks = list(result["hooks"])
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, (key, label) in enumerate((("r2", "R²"), ("q_star", "stability q*"))):
        for column, split in enumerate(("train", "heldout")):
            panel = panels[row, column]
            for index, ((unit, level), cells) in enumerate(by_unit(result["hooks"]).items()):
                one = kind(unit)
                control = one.role not in COMPETING
                panel.plot(
                    list(cells),
                    [mean_of(cell, split, key) for cell in cells.values()],
                    marker=MARKERS.get(unit, "o"),
                    markersize=4,
                    linestyle=":" if control else "-",
                    linewidth=2.5 if one.role == "ours" else 1.3,
                    color="black" if control else f"C{index % 10}",
                    alpha=0.65 if control else 1.0,
                    label=one.label + ("" if level is None else f", {level:g}"),
                )
            panel.grid(alpha=0.3)
            if row == 0:
                panel.set_title("training activations" if split == "train" else "held-out activations", fontsize=10)
            if column == 0:
                panel.set_ylabel(label)
    panels[0, 0].set_ylim(-0.3, 1.05)
    panels[1, 0].set_ylim(-0.03, 1.05)
    for panel in panels[1]:
        panel.set_xticks(range(len(hooks)), [_short(hook) for hook in hooks], fontsize=8)
        panel.set_xlabel("layer" if all(_short(hook) != hook for hook in hooks) else "hook")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    first = next(iter(result["hooks"].values()))
    figure.suptitle(f"{result['model']}   n = {first['n']:,}, F = {first['d_sae']:,}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _short(hook: str) -> str:
    parts = hook.split(".")
    return parts[1] if parts[0] == "blocks" and len(parts) > 1 else hook


def by_unit(hooks: Mapping[str, Any]) -> dict[tuple[str, Any], dict[int, Mapping[str, Any]]]:
    """Of each unit and level its cells, by the number of their hook.

    Not every unit is at every hook: features are of one, and levels end at the width.
    """
    found: dict[tuple[str, Any], dict[int, Mapping[str, Any]]] = {}
    for number, one in enumerate(hooks.values()):
        for cell in one["cells"]:
            found.setdefault((cell["unit"], cell["level"]), {})[number] = cell
    return found


def of_hooks(here: int, every: int) -> str:
    """What a unit's name is followed by where its mean is not over all hooks."""
    return "" if here == every else f" ({here} of {every} hooks)"
