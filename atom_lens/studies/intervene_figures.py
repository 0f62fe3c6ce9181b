"""What an `atom-lens intervene` study found, as tables, a verdict and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atom_lens.storage.files import replacing
from atom_lens.studies.report_text import aligned

_ROWS = {
    "swap": "swap, x + (z_B - z_A) D",
    "replace": "swap and drop the error, decode(z_B)",
    "exchange": "exchange by code, every token",
    "random": "null: random atoms, same norm",
    "other": "null: a third subject's code, same norm",
    "rest": "what the swap leaves out",
}


def _show(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{figure['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def intervene_table(result: Mapping[str, Any]) -> str:
    """Ceiling, floor and supervised baseline, then each unit: swaps, ablations, specificity; 95% intervals."""
    blocks = [
        f"{result['hook']} of {result['model']}: {result['n_facts']} facts that the model knows about held-out "
        f"subjects, with {result['n_answers']} answers",
        aligned(
            [["hook", "flips by whole patch, training facts"], *([h, _show(f)] for h, f in result["scan"].items())]
        ),
    ]
    cells = [["swaps", "K", "flips to B", "of ceiling", "A kept", "log-odds B over A"]]
    if result["cells"]:
        for name, label in (("none", "floor: no edit"), ("patch", "ceiling: whole activation of B")):
            cells.append(_swap_row(label, "", result["cells"][0]["swap"][name], None))
    cells.append(_swap_row("difference of class means (told the answers)", "", result["class_means"], None))
    for cell in result["cells"]:
        k = f"{cell['heldout']['l0']['mean']:.1f}"
        for name, label in _ROWS.items():
            cells.append(_swap_row(f"{cell['name']}: {label}", k, cell["swap"][name], cell["of_ceiling"].get(name)))
        for name in ("patch", "swap", "replace"):
            cells.append(_swap_row(f"{cell['name']}: {name}, subjects it was trained on", k, cell["train"][name], None))
    blocks.append(aligned(cells))
    for cell in result["cells"]:
        blocks.append(_details(cell))
    blocks.append(verdict(result))
    return "\n\n".join(blocks)


def _swap_row(label: str, k: str, figures: Mapping[str, Any], ratio: Mapping[str, Any] | None) -> list[str]:
    return [
        label,
        k,
        _show(figures["flips"]),
        "" if ratio is None else f"{ratio['mean']:.0%} ({ratio['interval'][0]:.0%} to {ratio['interval'][1]:.0%})",
        _show(figures["kept"]),
        _show(figures["log_odds"], 2),
    ]


def _details(cell: Mapping[str, Any]) -> str:
    ablations = [[cell["name"], "drop of ln p(A)", "answers lost"]]
    for name, figures in cell["ablate"].items():
        if name != "none":
            label = name.replace("random", "null: random atoms for")
            ablations.append([f"ablate by {label}", _show(figures["drop"], 2), _show(figures["lost"])])
    divergences = [["KL, nats", *dict.fromkeys(n for f in cell["kl"].values() if f for n in f)]]
    for where, figures in cell["kl"].items():
        if figures:
            label = where.replace("_", " ")
            divergences.append([label, *(_show(figures.get(name), 4) for name in divergences[0][1:])])
    return "\n\n".join(
        [
            aligned(ablations),
            aligned(divergences),
            f"log-odds rise at every dose up to 1: {_show(cell['monotone'])} of the facts",
        ]
    )


def verdict(result: Mapping[str, Any]) -> str:
    """What a reader wants to know first: how much of the ceiling swaps reach, how much the null, at which price."""
    lines = []
    for cell in result["cells"]:
        reached = {name: ratio["mean"] for name, ratio in cell["of_ceiling"].items() if ratio}
        if not reached:
            lines.append(f"{cell['name']}: the ceiling is zero, nothing can be said.")
            continue
        rises = {name: cell["swap"][name]["log_odds"]["mean"] for name in ("swap", "random", "other")}
        lines.append(
            f"{cell['name']} (K {cell['heldout']['l0']['mean']:.1f}, q* {cell['heldout']['q_star']:.3f}): swaps reach "
            f"{reached['swap']:.0%} of the ceiling's flips, {reached['replace']:.0%} without the error term, "
            f"{reached['exchange']:.0%} by code alone; log-odds of B over A rise by {rises['swap']:.2f} nats, with "
            f"random atoms of the same norm {rises['random']:.2f}, with a third subject's code {rises['other']:.2f}; "
            f"KL on unrelated text {cell['kl']['unrelated']['exchange']['mean']:.4f}."
        )
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Flips by unit against ceiling, null and class means; dose-response; ablations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    bars, doses, ablations = figure.subplots(1, 3)
    names = [cell["name"] for cell in result["cells"]]
    kinds = ("swap", "replace", "exchange", "other")
    labels = {
        "swap": "swap",
        "replace": "swap, error dropped",
        "exchange": "by code, every token",
        "other": "null: a third subject",
    }
    for i, kind in enumerate(kinds):
        values = [cell["swap"][kind]["flips"] for cell in result["cells"]]
        means = [value["mean"] for value in values]
        spread = [
            [m - v["interval"][0] for m, v in zip(means, values, strict=True)],
            [v["interval"][1] - m for m, v in zip(means, values, strict=True)],
        ]
        at = [j + (i - 1.5) * 0.2 for j in range(len(names))]
        bars.bar(
            at,
            means,
            0.2,
            yerr=spread,
            label=labels[kind],
            color="0.6" if kind == "other" else f"C{i}",
            error_kw={"linewidth": 1},
        )
    if result["cells"]:
        bars.axhline(
            result["cells"][0]["swap"]["patch"]["flips"]["mean"],
            color="black",
            linewidth=1,
            label="ceiling: whole activation",
        )
    bars.axhline(
        result["class_means"]["flips"]["mean"],
        color="black",
        linewidth=1,
        linestyle=":",
        label="class means (told the answers)",
    )
    bars.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    bars.set(ylabel="share of answers flipped to B's", ylim=(0, 1.0), title="Swapping subjects")
    bars.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
    for i, cell in enumerate(result["cells"]):
        points = sorted((float(dose), figures["log_odds"]["mean"]) for dose, figures in cell["doses"].items())
        doses.plot(*zip((0.0, 0.0), *points, strict=True), marker="o", markersize=3, color=f"C{i}", label=cell["name"])
        for rank, style in (("attribution", "-"), ("activation", "--"), ("random", ":")):
            drops = [(int(n.split()[1]), f["drop"]["mean"]) for n, f in cell["ablate"].items() if n.startswith(rank)]
            ablations.plot(
                *zip(*drops, strict=True),
                linestyle=style,
                marker="o",
                markersize=3,
                color=f"C{i}",
                label=f"{cell['name']}, {rank}",
            )
    doses.set(xlabel="dose", ylabel="rise of the log-odds of B over A, nats", title="Dose-response of the swap")
    ablations.set(
        xlabel="atoms ablated", ylabel="drop of ln p(A), nats", title="Ablating A's strongest atoms", xscale="log"
    )
    if result["cells"]:
        ks = sorted({int(name.split()[1]) for name in result["cells"][0]["ablate"] if name != "none"})
        ablations.set_xticks(ks, [str(k) for k in ks])
    ablations.minorticks_off()
    for panel in (doses, ablations):
        panel.legend(fontsize=7, frameon=False)
    for panel in (bars, doses, ablations):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{result['hook']} of {result['model']}, {result['n_facts']} facts about held-out subjects", fontsize=11
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
