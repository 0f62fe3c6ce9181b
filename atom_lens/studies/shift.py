"""Representation shift: what angle do activations centre on, and which metric puts it back to 90 degrees?

A metric undoes the shift of the kind of text that it was estimated on. How far it does so on other kinds is a matrix: a
metric from each domain, on held-out activations of every domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atom_lens.activations.positions import Positions, check_prompts
from atom_lens.activations.prompts.prompt import as_prompts
from atom_lens.evidence.report import angles
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.recipe import Prompts, Recipe, register_section
from atom_lens.recipe.split import SplitActivations, harvest_for, split_activations
from atom_lens.storage.files import replacing
from atom_lens.storage.schema import Section
from atom_lens.studies.report_text import aligned


class Domain(Section):
    """A kind of text, and where it is read."""

    prompts: Prompts
    positions: Positions = "all"


register_section("domains", dict[str, Domain], {})

_NAMES = {"euclidean": "Euclidean", "seen": "AIP, seen"}


def shift(recipe: Recipe) -> dict[str, Any]:
    """Angles at every hook of `recipe`, Euclidean and under the metric of each domain.

    The domains are `recipe.domains`; without any, the prompts as they are read, and all tokens of `recipe.other_text`.

    Returns:
        hook -> domain -> {"n", "n_heldout", "condition", "euclidean", "seen" (rows that the domain's metric saw),
        "heldout" (other subjects or texts of the domain, Euclidean), "under": {domain: those under its metric}}.
        Angles are {"mean", "median", "percentiles"} in degrees (theory.md section 1).

    Raises:
        ValueError: a domain has fewer activations than the metric needs.
    """
    domains = recipe.section(dict[str, Domain]) or {
        "prompts": Domain(prompts=recipe.prompts, positions=recipe.positions),
        "other text": Domain(prompts=recipe.other_text),
    }
    texts = {name: domain.prompts.read() for name, domain in domains.items()}
    for name, domain in domains.items():  # of every domain, before the first is harvested
        try:
            check_prompts(as_prompts(texts[name]), domain.positions)
        except ValueError as error:
            raise ValueError(f"domain {name!r}: {error}") from error
    splits: dict[str, dict[str, SplitActivations]] = {}
    for name, domain in domains.items():
        own = recipe.model_copy(update={"prompts": domain.prompts, "positions": domain.positions})
        prompts = texts[name]
        found = harvest_for(own, prompts)
        for hook in found:
            try:
                splits.setdefault(hook, {})[name] = split_activations(own, prompts, found, hook)
            except ValueError as error:
                raise ValueError(f"domain {name!r}: {error}") from error
    return {hook: _matrix(recipe, by_domain) for hook, by_domain in splits.items()}


def _matrix(recipe: Recipe, splits: dict[str, SplitActivations]) -> dict[str, Any]:
    metrics = {name: AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, name) for name, split in splits.items()}
    found = {}
    for name, split in splits.items():
        seen = angles(split.x, metrics[name])
        under = {other: angles(split.heldout, metric) for other, metric in metrics.items()}
        found[name] = {
            "n": len(split.x),
            "n_heldout": len(split.heldout),
            "condition": metrics[name].condition,
            "euclidean": seen["euclidean"],
            "seen": seen["aip"],
            "heldout": under[name]["euclidean"],
            "under": {other: one["aip"] for other, one in under.items()},
        }
    return found


def shift_table(found: dict[str, Any]) -> str:
    """Mean angles in degrees, a line per hook and domain; "under": held-out rows under the metric of a domain."""
    domains = list(next(iter(found.values())))
    rows = [["mean angle, degrees", "n", *_NAMES.values(), *(f"under {domain}" for domain in domains)]]
    for hook, matrix in found.items():
        for domain, one in matrix.items():
            means = [one[key]["mean"] for key in _NAMES] + [one["under"][other]["mean"] for other in domains]
            rows.append([f"{hook} {domain}", str(one["n"]), *(f"{mean:.2f}" for mean in means)])
    return aligned(rows)


def draw_shift(found: dict[str, Any], path: Path) -> None:
    """A matrix per hook: mean angle of held-out rows of a domain, Euclidean and under the metric of each."""
    from matplotlib.figure import Figure

    domains = list(next(iter(found.values())))
    size = 2.2 + 0.42 * len(domains)
    figure = Figure(figsize=(1.2 + size * len(found), size + 0.5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    image = None
    for panel, (hook, matrix) in zip(panels, found.items(), strict=True):
        means = [
            [one["heldout"]["mean"], *(one["under"][other]["mean"] for other in domains)] for one in matrix.values()
        ]
        image = panel.imshow(means, vmin=0, vmax=90, cmap="cividis")
        for i, row in enumerate(means):
            for j, mean in enumerate(row):
                panel.text(
                    *(j, i, f"{mean:.0f}"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if mean < 55 else "black",
                )
        panel.axvline(0.5, color="white", linewidth=3)
        panel.set_xticks(range(len(domains) + 1), ["Euclidean", *domains], rotation=60, ha="right", fontsize=8)
        panel.set_yticks(range(len(domains)), domains, fontsize=8)
        panel.set_title(hook, fontsize=9)
        panel.set_xlabel("metric of", fontsize=8)
    panels[0].set_ylabel("held-out activations of", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=panels, label="mean angle, degrees", shrink=0.8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
