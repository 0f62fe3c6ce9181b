"""Representation shift: what angle do activations centre on, and does the metric put it back to 90 degrees?"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from atom_lens.evidence.report import angles
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.rows import Rows
from atom_lens.training.recipe import Recipe
from atom_lens.training.run import harvest_for, split_activations


def shift(recipe: Recipe) -> dict[str, Any]:
    """Mean angles at every hook of `recipe`, Euclidean and under metrics from the same and from other text.

    Returns:
        hook -> {"n", "euclidean", "aip_same" (rows the metric saw), "aip_heldout" (other subjects of the same
        distribution), "aip_other_text" (metric from `recipe.other_text`), "other_text": {the same the other way}}.
        Angles are {"mean", "median"} in degrees (theory.md section 1).
    """
    prompts, texts = recipe.prompts.read(), recipe.other_text.read()
    here = harvest_for(recipe, prompts)
    there = harvest_for(recipe.model_copy(update={"positions": "all"}), texts)
    found = {}
    for hook in here:
        x, heldout, *_ = split_activations(recipe, prompts, here, hook)
        other, other_heldout, *_ = split_activations(recipe, texts, there, hook)
        metric = AtomicInnerProduct.estimate(x, recipe.metric.ridge, "the prompts")
        other_metric = AtomicInnerProduct.estimate(other, recipe.metric.ridge, "other text")
        found[hook] = _angles(x, heldout, metric, other_metric)
        found[hook]["other_text"] = _angles(other, other_heldout, other_metric, metric)
    return found


def _angles(
    x: Float[Tensor | Rows, "n d"],
    heldout: Float[Tensor | Rows, "m d"],
    same: AtomicInnerProduct,
    other: AtomicInnerProduct,
) -> dict[str, Any]:
    here = angles(x, same)
    return {
        "n": len(x),
        "n_metric": {"same": same.n, "other": other.n},
        "condition": same.condition,
        "euclidean": here["euclidean"],
        "aip_same": here["aip"],
        "aip_heldout": angles(heldout, same)["aip"],
        "aip_other_text": angles(heldout, other)["aip"],
    }


def shift_table(found: dict[str, Any]) -> str:
    """Mean angles in degrees, a line per hook and distribution."""
    columns = ("n", "Euclidean", "AIP", "AIP held-out", "AIP, other metric")
    widths = (7, 10, 8, 13, 18)
    header = f"{'mean angle, degrees':<36} " + " ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    lines = [header, "-" * len(header)]
    for hook, prompts in found.items():
        for label, f in ((f"{hook} prompts", prompts), (f"{hook} other text", prompts["other_text"])):
            means = [f[key]["mean"] for key in ("euclidean", "aip_same", "aip_heldout", "aip_other_text")]
            lines.append(
                f"{label:<36} {f['n']:>7} {means[0]:>10.2f} {means[1]:>8.2f} {means[2]:>13.2f} {means[3]:>18.2f}"
            )
    return "\n".join(lines)
