"""Evaluate atoms on disk, or any sae-lens SAE, on the activations of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.dictionaries import kinds
from atom_lens.dictionaries.folder import ALSO, SEED, WITHIN
from atom_lens.dictionaries.load import atoms_folder, open_dictionary
from atom_lens.dictionaries.metered import Metered
from atom_lens.errors import AtomLensError
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.results import Report
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.running import document_side
from atom_lens.recipe.split import harvest_for, prompts_of, sides, split_activations
from atom_lens.storage.files import check_writable, read_json, shown
from atom_lens.storage.terminal import say
from atom_lens.studies.train.show import report_table

logger = logging.getLogger(__name__)
# The keys that decide which subjects a recipe reads, and which of them it holds out.
_READ = {
    "model",
    "prompts",
    "hooks",
    "positions",
    "massive_ratio",
    "prepend_bos",
    "max_tokens",
    "split",
    "stream",
    "activations",
}


def recipe_beside(path: str | Path) -> Path:
    """The recipe.yaml of the run that atoms at `path` belong to."""
    atoms = Path(path)
    if atoms.name.startswith(WITHIN):  # these are inside the folder of the first seed
        atoms = atoms.parent
    for folder in (atoms, atoms.parent):
        if (folder / "recipe.yaml").is_file():
            return folder / "recipe.yaml"
    raise AtomLensError(
        f"no recipe.yaml in {str(path)!r} or above it: a run folder has one, and evaluate takes --recipe"
    )


def evaluate_folder(
    path: str | Path, recipe: Recipe | str | Path, overrides: Sequence[str] = (), hook: str | None = None
) -> Report:
    """The report of the atoms, or of any sae-lens SAE, at `path`, on the activations of `recipe`.

    An SAE without a metric of its own is measured under the metric of the recipe's training split.

    Args:
        path: anything that `load_atoms` reads except releases; of any architecture that sae-lens has.
        recipe: gives the activations and their split.
        overrides: ``section.key=value``, applied to a recipe that is read from a file.
        hook: which atoms of a run over several hooks.

    Raises:
        AtomLensError: the hook of the atoms is not among the recipe's, widths differ, or the recipe's split is not the
            one these atoms were trained with.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = atoms_folder(path, hook)
    check_split(folder, recipe)
    atoms = open_dictionary(folder)
    has_metric = isinstance(atoms, Metered) and atoms.aip.n > 0
    hook = str(atoms.cfg.metadata.hook_name)
    prompts = prompts_of(recipe)
    found = harvest_for(recipe, prompts)
    if hook not in found:
        raise AtomLensError(f"the atoms' hook {hook!r} is not among the recipe's, allowed are {', '.join(found)}")
    x, heldout, subjects, *_ = split_activations(recipe, prompts, found, hook)
    metric = None if has_metric else AtomicInnerProduct.estimate(x, recipe.metric.ridge, "the recipe's training split")
    about = {
        "name": recipe.name,
        "kind": _kind(folder, atoms.cfg.architecture()),
        "model": recipe.model.name,
        "hook": hook,
        "positions": recipe.positions,
        "massive_rows_dropped": found.dropped[hook],
        "seconds": {"harvest": found.seconds},
    }
    seed = recipe.training.seed if recipe.training else 0
    return evaluate(atoms, x, heldout, metric, groups=subjects, seed=seed, about=about)


def _kind(folder: Path, architecture: str) -> str | None:
    """The kind that the report in a folder names, that of the first seed for another; or else one of our architectures.

    A folder of a stock architecture does not say whether it was trained on raw or whitened activations.
    """
    if folder.name.startswith(ALSO):
        return folder.name.removeprefix(ALSO)
    report = (folder.parent if folder.name.startswith(SEED) else folder) / "report.json"
    kind = read_json(report).get("kind") if report.is_file() else None
    if kind in [one.name for one in kinds()]:
        return kind
    return architecture if architecture in [one.name for one in kinds() if one.role == "ours"] else None


def check_split(folder: Path, recipe: Recipe) -> None:
    """Refuse to measure atoms with a recipe of their own on held-out subjects that they were trained on.

    Args:
        folder: of the atoms, or of their run.
        recipe: the atoms are to be measured on its held-out rows.

    Raises:
        AtomLensError: some of those subjects were training subjects at a hook that both recipes read.
    """
    try:
        own = load_recipe(recipe_beside(folder))
    except ValueError:
        return
    if own.model_dump(include=_READ) == recipe.model_dump(include=_READ):
        return
    prompts = prompts_of(recipe)
    try:
        before = prompts_of(own) if own.stream is None else list(own.source("stream").documents())
        if {prompt.group for prompt in prompts}.isdisjoint(prompt.group for prompt in before):
            return
        theirs = _sides(own, before) if own.stream is None else _documents(own, before)
    except (ValueError, OSError) as error:
        logger.warning("these atoms' own prompts cannot be read, subjects held out now may be among them: %s", error)
        return
    for hook, (heldout, _) in _sides(recipe, prompts).items():
        if seen := sorted(heldout & theirs.get(hook, (set(), set()))[1]):
            raise AtomLensError(
                f"{len(seen)} of {len(heldout)} subjects held out now, such as {shown(seen[0])!r}, are subjects that "
                "these atoms were trained on: keep the prompts, positions and split of their recipe.yaml"
            )


def _sides(recipe: Recipe, prompts: Sequence[Prompt]) -> dict[str, tuple[set[str], set[str]]]:
    """Hook -> the subjects held out and those trained on, among the rows that are read."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for hook, rows in harvest_for(recipe, prompts).rows.items():
        groups = [prompts[prompt].group for prompt in rows[:, 0].tolist()]
        heldout = set(compress(groups, sides(recipe, groups)[0].tolist()))
        found[hook] = heldout, set(groups) - heldout
    return found


def _documents(recipe: Recipe, documents: Sequence[Prompt]) -> dict[str, tuple[set[str], set[str]]]:
    """`_sides` of a recipe that streams: it has read all documents, not only the stored ones."""
    groups = {document.group for document in documents}
    heldout = {group for group in groups if document_side(recipe.split, group) == "heldout"}
    hooks = harvest_for(recipe, prompts_of(recipe))
    return dict.fromkeys(hooks, (heldout, groups - heldout))


def command(
    atoms: str, /, *overrides: str, recipe: str | None = None, hook: str | None = None, json: Path | None = None
) -> None:
    """Measure atoms, or any sae-lens SAE, on the activations of a recipe.

    Example: atom-lens evaluate runs/quickstart

    Args:
        atoms: run folder, atoms folder, or any sae-lens SAE folder
        overrides: change a key of the recipe, e.g. model.device=cuda
        recipe: gives the activations (default: the run's own recipe.yaml)
        hook: which atoms, if the run has several hooks
        json: also write the report to this file
    """
    if json is not None:
        check_writable("--json", json)
    report = evaluate_folder(atoms, recipe or recipe_beside(atoms), overrides, hook)
    if json is not None:
        report.write(json)
    say(report_table(report, f"{report.hook} of {report.model}").text())
