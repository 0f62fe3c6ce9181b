"""Draws the pictures of docs/theory.md: python docs/img/concepts.py (in the top folder)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse

from atom_lens import AtomicInnerProduct, angle_histogram, stability

OUT = Path(__file__).parent
INK, QUIET, BLUE, RED = "#222222", "#999999", "#3a7bbf", "#c8455e"


def shift() -> None:
    """A cone of activations, and what the metric makes of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator) @ torch.tensor([[0.9, 0.25], [0.0, 0.45]]) + torch.tensor([3.2, 2.2])
    aip = AtomicInnerProduct.estimate(x, ridge=0.0)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.9), layout="constrained")
    for panel, rows, metric, title in (
        (panels[0], x.double(), None, "activations, Euclidean"),
        (panels[1], aip.whiten(x), aip, "the same, where the AIP is Euclidean"),
    ):
        mean = angle_histogram(x, metric).mean
        panel.plot(*rows.T, ".", color=BLUE, markersize=3, alpha=0.6)
        for one in rows[:12]:
            panel.plot([0, float(one[0])], [0, float(one[1])], color=RED, linewidth=0.8, alpha=0.6)
        panel.plot(0, 0, "+", color=INK, markersize=10)
        panel.set_aspect("equal")
        panel.set_title(f"{title}\nmean angle {mean:.0f}°", fontsize=10)
        panel.tick_params(labelsize=7)
    second = aip.whiten(x)
    panels[1].add_patch(Ellipse((0, 0), 2, 2, fill=False, color=QUIET, linestyle="--"))
    panels[1].set_xlim(min(-1.3, float(second[:, 0].min()) - 0.2), None)
    figure.savefig(OUT / "concept-metric.png", dpi=110)


def q_star() -> None:
    """The two shares whose crossing is q*."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2560, 640, generator=generator), dim=1)
    l0 = torch.poisson(torch.full((4000,), 6.0), generator=generator).long() + 1
    found = stability(atoms, l0)
    ks = list(range(1, int(l0.max()) + 1))
    codes = [float((l0 <= k).double().mean()) for k in ks]
    pairs = [int(found.below[k]) / found.pairs for k in ks]
    figure, panel = plt.subplots(figsize=(6.6, 3.6), layout="constrained")
    panel.step(ks, codes, where="post", color=BLUE, label="Φ(k): codes with at most k active atoms")
    panel.plot(ks, pairs, "o-", color=RED, markersize=3.5, label="G: pairs of coherence below 1/(2k − 1)")
    panel.axhline(found.q_star, color=INK, linewidth=1, linestyle="--")
    panel.annotate(f"q* = {found.q_star:.3f}", (ks[-1], found.q_star), ha="right", va="bottom", fontsize=10)
    panel.set(xlabel="k", ylabel="share", ylim=(0, 1.08))
    panel.set_xticks(ks)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    panel.grid(alpha=0.25)
    figure.savefig(OUT / "concept-q-star.png", dpi=110)


def memory() -> None:
    """Figures of recipes/headline.yaml: what in sample and held-out say, atoms beside nulls."""
    names = ["atoms", "data points\nas atoms", "random\ndirections"]
    train, heldout = [0.9998, 1.0, 0.5131], [0.2768, 0.7019, 0.5764]
    figure, panel = plt.subplots(figsize=(6.0, 3.3), layout="constrained")
    for offset, values, color, label in ((-0.2, train, QUIET, "training"), (0.2, heldout, RED, "held-out")):
        bars = panel.bar([i + offset for i in range(3)], values, 0.38, color=color, label=label)
        panel.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8)
    panel.set_xticks(range(3), names)
    panel.set(ylabel="R²", ylim=(0, 1.15))
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / "concept-memory.png", dpi=110)


if __name__ == "__main__":
    shift()
    q_star()
    memory()
