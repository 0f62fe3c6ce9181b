"""Frontiers: held-out R² against q*, one line per unit; as a table, a CSV file, a figure, and a verdict."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atom_lens.dictionaries import kind
from atom_lens.storage.files import replacing
from atom_lens.studies.report_text import aligned

_LEAST_Q = 0.5
MARKERS = {"null_random": "x", "null_data": "+", "neurons": "s", "principal": "^"}
# Controls and nulls do not compete: their encoder is a pursuit, or they are not sparse.
COMPETING = ("ours", "baseline")


def mean_of(cell: Mapping[str, Any], split: str, *path: str) -> float:
    """Mean over seeds."""
    values = []
    for run in cell["runs"]:
        node = run[split]
        for key in path:
            node = node[key]
        values.append(node)
    return float(np.mean(values))


def comparison_table(found: Mapping[str, Any]) -> str:
    """A line per unit and sparsity: means over seeds, and half the range of held-out R² between them."""
    heads = ["unit", "asked", "L0", "L0 held", "R² train", "R² held-out", "", "R² (AIP) held", "q* train"]
    heads += ["q* held", "empty", "dead", "PW-MCC", "at start", "> 0.9"]
    cells = [heads]
    for cell in found["cells"]:
        held = [run["heldout"]["r2"] for run in cell["runs"]]
        same = cell["identity"]
        cells.append(
            [
                kind(cell["unit"]).label,
                "" if cell["level"] is None else f"{cell['level']:g}",
                f"{mean_of(cell, 'train', 'l0', 'mean'):.1f}",
                f"{mean_of(cell, 'heldout', 'l0', 'mean'):.1f}",
                f"{mean_of(cell, 'train', 'r2'):.3f}",
                f"{np.mean(held):.3f}",
                f"± {(max(held) - min(held)) / 2:.3f}" if len(held) > 1 else "",
                f"{mean_of(cell, 'heldout', 'r2_aip'):.3f}",
                f"{mean_of(cell, 'train', 'q_star'):.3f}",
                f"{mean_of(cell, 'heldout', 'q_star'):.3f}",
                f"{mean_of(cell, 'heldout', 'empty_codes'):.1%}",
                f"{mean_of(cell, 'train', 'dead_atoms'):.0f}",
                f"{same['pw_mcc']:.3f}" if same else "",
                f"{same['pw_mcc_start']:.3f}" if same else "",
                f"{same['above_09']:.1%}" if same else "",
            ]
        )
    return aligned(cells)


def margins(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each point of a trained baseline at q* >= 0.5, how far a TSAE that is at least as stable is above it.

    `margin` is the best held-out R² among the TSAE points of no smaller q*, less the baseline's; None where no TSAE is
    as stable. Nothing is interpolated. Below q* = 0.5 codes are dense and R² is no merit: neurons have 1.
    """
    cells = found["cells"]
    points = [(c, mean_of(c, "heldout", "q_star"), mean_of(c, "heldout", "r2")) for c in cells]
    ours = [(q, r2) for c, q, r2 in points if kind(c["unit"]).role == "ours"]
    result = []
    for cell, q, r2 in points:
        if kind(cell["unit"]).role != "baseline" or q < _LEAST_Q:
            continue
        as_stable = [value for at, value in ours if at >= q]
        margin = max(as_stable) - r2 if as_stable else None
        result.append({"unit": cell["unit"], "level": cell["level"], "q_star": q, "r2": r2, "margin": margin})
    return result


def verdict(found: Mapping[str, Any]) -> str:
    """In a few words: how many baseline points a TSAE beats in both figures, and where one does not."""
    points = margins(found)
    if not points:
        return f"No baseline reached q* {_LEAST_Q}: there is nothing to beat."
    beaten = [point for point in points if point["margin"] is not None and point["margin"] >= 0]
    text = f"Of {len(points)} baseline points with q* >= {_LEAST_Q}, {len(beaten)} lie below a TSAE at least as stable"
    for point in points:
        asked = "" if point["level"] is None else f" at {point['level']:g}"
        name = f"{kind(point['unit']).label}{asked} (q* {point['q_star']:.3f}, R² {point['r2']:.3f})"
        if point["margin"] is None:
            text += f"; {name} is more stable than any TSAE"
        elif point["margin"] < 0:
            text += f"; {name} is above by {-point['margin']:.3f}"
    return text + "."


def to_csv(result: Mapping[str, Any], path: Path) -> None:
    """One row per hook, unit, sparsity, seed and split."""
    names = ["hook", "unit", "asked", "run", "split", "n", "r2", "r2_low", "r2_high", "r2_aip", "q_star", "l0"]
    names += ["l0_p998", "empty_codes", "dead_atoms", "pw_mcc", "above_09"]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(names)
        for hook, found in result["hooks"].items():
            for cell in found["cells"]:
                same = cell["identity"] or {}
                for number, run in enumerate(cell["runs"]):
                    for split, f in run.items():
                        low, high = f.get("interval", {}).get("r2", ("", ""))
                        row = [hook, cell["unit"], cell["level"], number, split, f["n"], f["r2"], low, high]
                        row += [f["r2_aip"], f["q_star"], f["l0"]["mean"], f["l0"]["p998"], f["empty_codes"]]
                        rows.writerow([*row, f["dead_atoms"], same.get("pw_mcc", ""), same.get("above_09", "")])


def draw(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Held-out R² against q*, in the Euclidean and the AIP norm: lines for trained units, dashes for controls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplots(1, 2)
    units = list(dict.fromkeys(cell["unit"] for cell in found["cells"]))
    for panel, (key, label) in zip(panels, (("r2", "R²"), ("r2_aip", "R² (AIP)")), strict=True):
        for index, unit in enumerate(units):
            cells = [cell for cell in found["cells"] if cell["unit"] == unit]
            points = sorted((mean_of(c, "heldout", "q_star"), mean_of(c, "heldout", key)) for c in cells)
            one = kind(unit)
            control, ours = one.role not in COMPETING, one.role == "ours"
            panel.plot(
                *zip(*points, strict=True),
                label=one.label,
                color="black" if control else f"C{index % 10}",
                linestyle=":" if control else "-",
                marker=MARKERS.get(unit, "o"),
                markersize=7 if ours else 5,
                linewidth=3 if ours else 1.3,
                alpha=0.7 if control else 1.0,
            )
            for cell in cells:
                seeds = [(run["heldout"]["q_star"], run["heldout"][key]) for run in cell["runs"]]
                panel.scatter(*zip(*seeds, strict=True), s=5, color="black" if control else f"C{index % 10}")
        panel.set_xlabel("stability q* (held-out codes)")
        panel.set_ylabel(f"held-out {label}")
        panel.set_ylim(-0.25, 1.05)
        panel.set_xlim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{title}   n = {found['n']}, F = {found['d_sae']}, n / F = {found['n_over_f']:.1f}", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
