"""Frontiers: held-out R² against q*, one line per unit; as a table, a CSV file, a figure, and a verdict."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atom_lens._files import replacing
from atom_lens.evidence.reading import aligned

LABELS: dict[str, str] = {
    "null_random": "null: random directions",
    "null_data": "null: data points",
    "neurons": "neurons",
    "principal": "principal directions",
    "relu": "ReLU",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "relu_whitened": "ReLU, whitened",
    "topk_whitened": "TopK, whitened",
    "batchtopk_whitened": "BatchTopK, whitened",
    "jumprelu_whitened": "JumpReLU, whitened",
    "tsae_tied": "TSAE, tied (ours)",
    "tsae_free": "TSAE, free (ours)",
}
# Controls, not competitors: their encoder is a pursuit, or they are not sparse.
_CONTROLS = ("null_random", "null_data", "neurons", "principal")


def _mean(cell: Mapping[str, Any], split: str, *path: str) -> float:
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
                LABELS.get(cell["unit"], str(cell["unit"])),
                "" if cell["level"] is None else f"{cell['level']:g}",
                f"{_mean(cell, 'train', 'l0', 'mean'):.1f}",
                f"{_mean(cell, 'heldout', 'l0', 'mean'):.1f}",
                f"{_mean(cell, 'train', 'r2'):.3f}",
                f"{np.mean(held):.3f}",
                f"± {(max(held) - min(held)) / 2:.3f}" if len(held) > 1 else "",
                f"{_mean(cell, 'heldout', 'r2_aip'):.3f}",
                f"{_mean(cell, 'train', 'q_star'):.3f}",
                f"{_mean(cell, 'heldout', 'q_star'):.3f}",
                f"{_mean(cell, 'heldout', 'empty_codes'):.1%}",
                f"{_mean(cell, 'train', 'dead_atoms'):.0f}",
                f"{same['pw_mcc']:.3f}" if same else "",
                f"{same['pw_mcc_start']:.3f}" if same else "",
                f"{same['above_09']:.1%}" if same else "",
            ]
        )
    return aligned(cells)


def frontier(cells: Sequence[Mapping[str, Any]], unit: str) -> list[tuple[float, float]]:
    """(q*, held-out R²) of a unit, means over seeds, in order of q*."""
    return sorted((_mean(c, "heldout", "q_star"), _mean(c, "heldout", "r2")) for c in cells if c["unit"] == unit)


def margins(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each point of a trained baseline, how far above it our best line is at the same q*.

    Lines are interpolated between their points, never beyond: `margin` is None where no line of ours reaches.
    """
    cells = found["cells"]
    ours = [frontier(cells, unit) for unit in ("tsae_tied", "tsae_free")]
    result = []
    for cell in cells:
        if cell["unit"].startswith("tsae") or cell["unit"] in _CONTROLS:
            continue
        q, r2 = _mean(cell, "heldout", "q_star"), _mean(cell, "heldout", "r2")
        at_q = [
            float(np.interp(q, [at for at, _ in line], [value for _, value in line]))
            for line in ours
            if line and line[0][0] <= q <= line[-1][0]
        ]
        margin = max(at_q) - r2 if at_q else None
        result.append({"unit": cell["unit"], "level": cell["level"], "q_star": q, "r2": r2, "margin": margin})
    return result


def verdict(found: Mapping[str, Any]) -> str:
    """In one sentence: is our line above every baseline at every q*, and if not, which is above it?"""
    points = margins(found)
    compared = [point for point in points if point["margin"] is not None]
    if not compared:
        return "No point of a baseline lies within the range of q* that a TSAE reached: nothing can be said."
    worse = [point for point in compared if point["margin"] < 0]
    text = (
        f"At the q* of {len(compared)} of {len(points)} baseline points a TSAE can be read off; "
        f"its held-out R² is higher at {len(compared) - len(worse)} of them"
    )
    if worse:
        worst = min(worse, key=lambda point: point["margin"])
        text += (
            f", and lower by up to {-worst['margin']:.3f} at the others "
            f"({LABELS.get(worst['unit'], worst['unit'])} at q* {worst['q_star']:.3f})"
        )
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
            points = sorted((_mean(c, "heldout", "q_star"), _mean(c, "heldout", key)) for c in cells)
            control, ours = unit in _CONTROLS, unit.startswith("tsae")
            panel.plot(
                *zip(*points, strict=True),
                label=LABELS.get(unit, unit),
                color="black" if control else f"C{index % 10}",
                linestyle=":" if control else "-",
                marker={"null_random": "x", "null_data": "+", "neurons": "s", "principal": "^"}.get(unit, "o"),
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
