"""The atomic inner product undoes the shift, for the distribution it was estimated on, and partly for others.

    python examples/02_aip_correction.py [--cities 1200] [--paragraphs 60] [--out examples/02_aip_correction.png]

Angles between cities the metric never saw: Euclidean, under the metric of other cities (same distribution), and under
the metric of English prose (cross-distribution). A metric belongs to the text that it comes from.
Needs `pip install "atom-lens[demo]"`; the first run converts the model (a minute).
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from atom_lens import AtomicInnerProduct, angle_histogram, harvest
from atom_lens.activations.prompts.cities import Cities
from atom_lens.activations.prompts.standard_library import PythonDocs

HOOK = "blocks.9.hook_resid_post"

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--cities", type=int, default=1200)
arguments.add_argument("--paragraphs", type=int, default=60)
arguments.add_argument("--out", default="examples/02_aip_correction.png")
options = arguments.parse_args()

x = harvest("demo:gemma-3-270m", Cities(limit=options.cities).read(), HOOK)[HOOK]
prose = harvest("demo:gemma-3-270m", PythonDocs(limit=options.paragraphs).read(), HOOK, positions="all")[HOOK]
# Every third city is held out from the metric: angles between cities that it has seen would be easy to correct.
unseen, seen = x[::3], x[[i for i in range(len(x)) if i % 3]]

metrics = {
    "Euclidean": None,
    f"AIP from {len(seen):,} other cities": AtomicInnerProduct.estimate(seen, source="cities"),
    f"AIP from {len(prose):,} tokens of prose": AtomicInnerProduct.estimate(prose, source="Python docs"),
}
figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
for label, metric in metrics.items():
    histogram = angle_histogram(unseen, metric, bins=360)
    print(f"{label:34s} mean angle {histogram.mean:5.1f} degrees")
    axes.stairs(
        histogram.counts / histogram.pairs / 0.5,
        histogram.edges,
        fill=True,
        alpha=0.55,
        label=f"{label}: mean {histogram.mean:.1f}°",
    )
axes.axvline(90, color="black", linewidth=1, linestyle="--")
axes.set(
    xlim=(0, 130),
    xlabel="angle between two cities that no metric saw (degrees)",
    ylabel="share of pairs per degree",
    title=f"Layer 9 of Gemma 3 270M, {len(unseen):,} held-out cities",
)
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 1))
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(options.out, dpi=150)
print(f"drawn to {options.out}")
