"""The representation shift: in the Euclidean metric, activations of different entities hardly differ in direction.

    python examples/01_representation_shift.py [--cities 1200] [--out examples/01_representation_shift.png]

Reads the last token of city names at three layers of the demo model, and draws the angles of all pairs. If directions
were spread evenly they would centre on 90 degrees; they do not, because all activations share one large component.
Needs `pip install "atom-lens[demo]"`; the first run converts the model (a minute).
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from atom_lens import angle_histogram, harvest
from atom_lens.activations.prompts.cities import Cities

LAYERS = (3, 9, 15)

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--cities", type=int, default=1200)
arguments.add_argument("--out", default="examples/01_representation_shift.png")
options = arguments.parse_args()

hooks = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
activations = harvest("demo:gemma-3-270m", Cities(limit=options.cities).read(), hooks)

figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
for layer, hook in zip(LAYERS, hooks, strict=True):
    histogram = angle_histogram(activations[hook], bins=360)
    print(f"layer {layer:2d}: mean angle {histogram.mean:5.1f} degrees over {histogram.pairs:,} pairs")
    axes.stairs(
        histogram.counts / histogram.pairs / 0.5, histogram.edges, fill=True, alpha=0.55, label=f"layer {layer}"
    )
axes.axvline(90, color="black", linewidth=1, linestyle="--")
axes.annotate(
    "evenly spread directions", (90, 0.97), (87, 0.97), xycoords=("data", "axes fraction"), ha="right", va="top"
)
axes.set(
    xlim=(0, 120),
    xlabel="Euclidean angle between two cities (degrees)",
    ylabel="share of pairs per degree",
    title=f"Residual stream of Gemma 3 270M, last token of {options.cities:,} city names",
)
axes.legend(frameon=False, loc="center right")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(options.out, dpi=150)
print(f"drawn to {options.out}")
