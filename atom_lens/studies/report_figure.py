"""The report as a picture: how the metric turns the angles, and where atoms and nulls stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atom_lens.storage.files import replacing


def draw_report(report: Mapping[str, Any], path: Path) -> None:
    """Angles between activations, and R² against q* of atoms and nulls, train (hollow) and held-out (filled); a PNG.

    Args:
        report: report.json.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    angles, euclidean, aip = figure.subplots(1, 3)
    for height, name in ((1, "euclidean"), (0, "aip")):
        found = report["angles"][name]
        percents = found["percentiles"]
        angles.plot([percents["0.1"], percents["99.9"]], [height] * 2, color="C0", linewidth=1.5)
        angles.plot([percents["5"], percents["95"]], [height] * 2, color="C0", linewidth=6)
        angles.plot([found["median"]], [height], "o", color="white", markeredgecolor="C0", markersize=9)
        angles.text(min(max(found["median"], 14), 166), height + 0.14, f"{found['median']:.1f}°", ha="center")
    angles.axvline(90, color="black", linestyle=":", linewidth=1)
    angles.set(xlim=(0, 180), ylim=(-0.5, 1.5), yticks=[0, 1], yticklabels=["AIP", "Euclidean"])
    angles.set_xticks([0, 45, 90, 135, 180])
    angles.set_xlabel("angle between activations, degrees")
    angles.set_title("median, 90% and 99.8% of pairs", fontsize=9)
    units = {"atoms": report, **{f"null: {name}": null for name, null in report["nulls"].items()}}
    for panel, key, label in ((euclidean, "r2", "R²"), (aip, "r2_aip", "R² (AIP)")):
        every: list[tuple[float, float]] = []
        for index, (name, unit) in enumerate(units.items()):
            color = "C3" if index == 0 else f"{0.1 + 0.15 * index:.2f}"
            points = []
            for split in ("train", "heldout"):
                one = unit.get(split)
                if one is None:
                    continue
                value = one.get("r2_euclidean_pursuit", one["r2"]) if key == "r2" else one[key]
                points.append((one["q_star"], value))
                panel.plot(
                    *points[-1],
                    marker="*" if index == 0 else "sD^v"[(index - 1) % 4],
                    markersize=14 if index == 0 else 8,
                    color=color if split == "heldout" else "none",
                    markeredgecolor=color,
                    linestyle="none",
                    label=name if split == "heldout" or unit.get("heldout") is None else None,
                )
            panel.plot(*zip(*points, strict=True), color=color, linewidth=0.7)
            every += points
        panel.axhline(0, color="black", linewidth=0.5)
        least_q, least_r2 = (min(values) for values in zip(*every, strict=True))
        # Stable or not, what differs is often the last tenth of q*.
        left = math.floor(10 * least_q - 0.2) / 10
        panel.set(xlim=(left, 1 + 0.03 * (1 - left)), ylim=(max(-1.0, min(0.0, least_r2)) - 0.06, 1.05))
        panel.set(xlabel="stability q*", ylabel=label)
        panel.grid(alpha=0.3)
    aip.legend(
        title="hollow: train, filled: held-out",
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize=9,
    )
    head = f"{report.get('hook', '')}   n = {report['n']}, F = {report['d_sae']}, n / F = {report['n_over_f']:.1f}"
    figure.suptitle(head.strip(), fontsize=11)
    with replacing(path) as temporary:
        # Without the software's version, so that the same report is the same file and is not sent again.
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
