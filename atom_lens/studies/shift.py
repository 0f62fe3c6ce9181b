"""Measure the angles between activations, Euclidean and under the metric of each kind of text.

The representation shift is a mean angle far below 90 degrees; which metric brings it back to 90 degrees?
A metric undoes the shift of the kind of text that it was estimated on. A matrix shows how far it does so on others: the
metric of each domain on held-out activations of every domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from pydantic import Field

from atom_lens.activations.positions import Positions, check_prompts
from atom_lens.activations.prompts.prompt import as_prompts
from atom_lens.errors import AtomLensError
from atom_lens.evidence.report import angles
from atom_lens.evidence.results import Angles
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Prompts, Recipe, register_section
from atom_lens.recipe.split import SplitActivations, harvest_for, split_activations
from atom_lens.storage.files import check_new
from atom_lens.storage.schema import Result, Section
from atom_lens.storage.versions import versions
from atom_lens.studies.cells import result_folder
from atom_lens.studies.study import Part, Study, recipe_command, register
from atom_lens.views.plot import Draw, Panel, plain
from atom_lens.views.table import Row, Table


class Domain(Section):
    """A kind of text, and the positions that are read."""

    prompts: Prompts
    positions: Positions = "all"


register_section("domains", dict[str, Domain], {})


class DomainAngles(Result):
    """Angles of one domain in degrees (theory.md section 1)."""

    n: int
    n_heldout: int
    condition: float
    euclidean: Angles
    seen: Angles = Field(description="of training rows, under the metric estimated on them")
    heldout: Angles = Field(description="of other subjects or texts of the domain, Euclidean")
    under: dict[str, Angles] = Field(description="of the same, under the metric of each domain")


class Shifts(Result):
    """The content of shift.json: hook -> domain -> angles."""

    schema_version: int = 1
    model: str
    hooks: dict[str, dict[str, DomainAngles]] = Field(min_length=1)
    versions: dict[str, str]


def shift(recipe: Recipe, out: str | Path = "runs") -> Path:
    """Angles at every hook of `recipe`, Euclidean and under the metric of each domain; returns ``out/<name>``.

    The domains are those of `domains`; without any, the recipe's prompts, and all tokens of `other_text`.

    Raises:
        AtomLensError: a domain has fewer activations than the metric needs.
    """
    domains = recipe.section(dict[str, Domain]) or {
        "prompts": Domain(prompts=recipe.source("shift"), positions=recipe.positions),
        "other text": Domain(prompts=recipe.other_text),
    }
    folder = Path(out) / recipe.name
    check_new(folder, "another name=")
    texts = {name: domain.prompts.read() for name, domain in domains.items()}
    for name, domain in domains.items():  # check every domain before the first is harvested
        try:
            check_prompts(as_prompts(texts[name]), domain.positions)
        except ValueError as error:
            raise AtomLensError(f"domain {name!r}: {error}") from error
    splits: dict[str, dict[str, SplitActivations]] = {}
    for name, domain in domains.items():
        own = recipe.model_copy(update={"prompts": domain.prompts, "positions": domain.positions, "stream": None})
        prompts = texts[name]
        found = harvest_for(own, prompts)
        for hook in found:
            try:
                splits.setdefault(hook, {})[name] = split_activations(own, prompts, found, hook)
            except ValueError as error:
                raise AtomLensError(f"domain {name!r}: {error}") from error
    hooks = {hook: _matrix(recipe, by_domain) for hook, by_domain in splits.items()}
    with result_folder(folder) as work:
        study.keep(Shifts(model=recipe.model.name, hooks=hooks, versions=versions()), work)
    return folder


def _matrix(recipe: Recipe, splits: dict[str, SplitActivations]) -> dict[str, DomainAngles]:
    metrics = {name: AtomicInnerProduct.estimate(split.x, recipe.metric.ridge, name) for name, split in splits.items()}
    found = {}
    for name, split in splits.items():
        seen = angles(split.x, metrics[name])
        under = {other: angles(split.heldout, metric) for other, metric in metrics.items()}
        found[name] = DomainAngles(
            n=len(split.x),
            n_heldout=len(split.heldout),
            condition=metrics[name].condition,
            euclidean=seen["euclidean"],
            seen=seen["aip"],
            heldout=under[name]["euclidean"],
            under={other: one["aip"] for other, one in under.items()},
        )
    return found


def show(result: Shifts, name: str) -> list[Part]:
    """Mean angles, a line per hook and domain, and as a matrix per hook."""
    domains = list(next(iter(result.hooks.values())))
    heads = ["mean angle, degrees", "n", "Euclidean", "AIP, seen", *(f"under {domain}" for domain in domains)]
    rows = []
    for hook, matrix in result.hooks.items():
        for domain, one in matrix.items():
            means = [one.euclidean, one.seen, *(one.under[other] for other in domains)]
            rows.append(Row(f"{hook} {domain}", [str(one.n), *(f"{found.mean:.2f}" for found in means)]))
    note = 'Columns "under" are for held-out rows, under the metric of a domain.'
    panel = Panel(
        "Mean angles",
        "Held-out activations of each domain (rows), Euclidean and under the metric of each (columns), degrees.",
        {f"{name}, {hook}": _heat(matrix) for hook, matrix in result.hooks.items()},
    )
    return [Part("Representation shift", [Table(f"{name} · {result.model}", heads, rows, notes=[note])], [panel])]


def _heat(matrix: dict[str, DomainAngles]) -> Draw:
    def draw(axes: Axes) -> None:
        domains = list(matrix)
        means = [[one.heldout.mean, *(one.under[other].mean for other in domains)] for one in matrix.values()]
        axes.grid(visible=False)
        axes.pcolormesh(means, vmin=0, vmax=90, cmap="cividis", edgecolors="white", linewidth=0.5)
        for i, row in enumerate(means):
            for j, mean in enumerate(row):
                color = "white" if mean < 55 else "black"
                axes.text(j + 0.5, i + 0.5, f"{mean:.0f}", ha="center", va="center", fontsize=9, color=color)
        names = [plain(domain) for domain in domains]
        axes.set_xticks([i + 0.5 for i in range(len(names) + 1)], ["Euclidean", *names], rotation=50, ha="right")
        axes.set_yticks([i + 0.5 for i in range(len(names))], names)
        axes.invert_yaxis()

    return draw


study = register(Study(name="shift", result=Shifts, show=show))


def _from_file(recipe: str, overrides: Sequence[str], out: Path) -> Path:
    return shift(load_recipe(recipe, overrides), out)


command = recipe_command(study, _from_file, "atom-lens shift shift")
