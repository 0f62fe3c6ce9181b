"""A run's atoms and activations, opened once for all that the page shows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import plotly.graph_objects as go
from safetensors.torch import load_file

from atom_lens.dictionaries.load import load_atoms
from atom_lens.dictionaries.tsae.sae import TSAE
from atom_lens.evidence.measure import Observation, observe
from atom_lens.recipe.contexts import Corpus, corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.studies.page.atoms import browse
from atom_lens.studies.page.folders import Folder
from atom_lens.studies.page.geometry_charts import angles, coherences
from atom_lens.studies.page.words import Lens, columns, is_residual, open_lens
from atom_lens.studies.train import IDENTITY_FILENAME

logger = logging.getLogger(__name__)
_LEFT_OUT = "angles, coherences and atoms are left out"
_SAME_R2 = 1e-3  # between devices and versions of torch


@dataclass(frozen=True)
class Opened:
    """What one hook of a run shows of its atoms: figures, and the browser's data."""

    label: str
    angles: go.Figure
    coherences: go.Figure | None
    atoms: dict[str, Any]


def open_hooks(folder: Folder) -> Iterator[Opened | str]:
    """Every hook of a run; or the sentence that says why its atoms or activations are not to be had here."""
    if not folder.reports:
        return
    try:
        recipe = load_recipe(folder.path / "recipe.yaml")
    except (ValueError, OSError) as error:
        yield f"{folder.name}: {_LEFT_OUT}, {_sentence(error)}."
        return
    lens = _lens(recipe, folder.reports)
    missing: dict[str, list[str]] = {}
    for hook in folder.reports:
        try:
            made = _open(folder, recipe, hook, lens)
        except (ValueError, OSError) as error:
            missing.setdefault(_sentence(error), []).append(hook)
        else:
            yield made
    for why, hooks in missing.items():  # what is wrong with the prompts is wrong at all hooks, and said once
        yield f"{folder.name} · {', '.join(hooks)}: {_LEFT_OUT}, {why}."


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _lens(recipe: Recipe, hooks: Iterable[str]) -> Lens | str | None:
    """None where no hook has words: a model takes minutes to load."""
    if not any(is_residual(hook) for hook in hooks):
        return None
    try:
        return open_lens(recipe.model)
    except Exception as error:  # the words are extra: whatever a model of any kind does here, the page goes on
        return f"Logit-lens words are left out: {_sentence(error)}."


def _words(lens: Lens | str | None, hook: str, atoms: TSAE) -> dict[str, Any] | str:
    if lens is None or not is_residual(hook):
        return (
            f"Logit-lens words are left out: hook {hook!r} is not in the residual stream, where the unembedding reads."
        )
    if isinstance(lens, str):
        return lens
    try:
        return columns(lens, atoms.W_dec.detach())
    except Exception as error:  # as above
        return f"Logit-lens words are left out: {_sentence(error)}."


def _open(folder: Folder, recipe: Recipe, hook: str, lens: Lens | str | None) -> Opened:
    logger.info("%s, %s: reading atoms and contexts", folder.name, hook)
    atoms = load_atoms(folder.path, hook=hook)
    seen = corpus(recipe, hook)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    _check_same(folder.reports[hook], seen, heldout)
    identity = folder.path / hook / IDENTITY_FILENAME
    scores = load_file(identity)["identity"] if identity.is_file() else None
    data = {**browse(atoms, seen, heldout, scores), "words": _words(lens, hook, atoms)}
    seed = recipe.training.seed if recipe.training else 0
    return Opened(f"{folder.name} · {hook}", angles(seen, atoms.aip), coherences(heldout, atoms.aip, seed), data)


def _check_same(report: Mapping[str, Any], seen: Corpus, heldout: Observation) -> None:
    """The recipe says where the prompts are, not what was in them: other prompts give another split, and no trouble."""
    n_train, kept, figures = len(seen) - len(heldout), report.get("heldout") or {}, heldout.figures
    if (report["n"], kept.get("n")) != (n_train, len(heldout)):
        was = f"{report['n']} training and {kept.get('n')} held-out activations, here are {n_train} and {len(heldout)}"
    elif not isclose(kept["r2"], figures["r2"], rel_tol=_SAME_R2, abs_tol=_SAME_R2):
        was = f"held-out R² {kept['r2']:.4f}, here it is {figures['r2']:.4f}"
    else:
        return
    raise ValueError(f"the prompts or the model are not those of the run: its report has {was}")
