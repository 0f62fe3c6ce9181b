"""The atoms browsers of a run: its atoms and activations are opened again, if they are unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atom_lens.activations.connect import open_model
from atom_lens.dictionaries.load import load_atoms
from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.errors import AtomLensError
from atom_lens.evidence.measure import Observation, observe
from atom_lens.evidence.results import Report
from atom_lens.recipe.contexts import Corpus, corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.sections import Model
from atom_lens.studies.report.atoms import browse
from atom_lens.studies.report.words import Lens, columns, is_residual, lens_of
from atom_lens.studies.train.result import RunReport
from atom_lens.studies.train.run import IDENTITY_FILENAME

logger = logging.getLogger(__name__)
_LEFT_OUT = "atoms are left out"
_SAME_R2 = 1e-3  # what devices and versions of torch may differ by


@dataclass(frozen=True)
class Browser:
    """The browser's data of one hook of a run."""

    label: str
    atoms: dict[str, Any]


def open_browsers(path: Path, name: str, result: RunReport) -> Iterator[Browser | str]:
    """Every hook of the run at `path`, or a sentence that says why its atoms cannot be shown."""
    try:
        recipe = load_recipe(path / "recipe.yaml")
    except (ValueError, OSError) as error:
        yield f"{name}: {_LEFT_OUT}, {_sentence(error)}."
        return
    lens = lens_for(result.hooks, lambda: _opened(recipe.model))
    missing: dict[str, list[str]] = {}
    for hook, report in result.hooks.items():
        logger.info("%s, %s: reading atoms and contexts", name, hook)
        try:
            yield Browser(f"{name} · {hook}", _atoms(path, recipe, hook, report, lens))
        except (ValueError, OSError) as error:
            missing.setdefault(_sentence(error), []).append(hook)
    for why, hooks in missing.items():  # a fault of the prompts affects all hooks, and is said once
        yield f"{name} · {', '.join(hooks)}: {_LEFT_OUT}, {why}."


def _opened(model: Model) -> Any:
    return open_model(model.name, revision=model.revision, dtype=model.dtype, device=model.device)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def lens_for(hooks: Iterable[str], open_model: Callable[[], Any]) -> Lens | str | None:
    """The lens, a sentence that says why there is none, or None if no hook has words: loading a model takes time."""
    if not any(is_residual(hook) for hook in hooks):
        return None
    try:
        return lens_of(open_model())
    except Exception as error:  # the words are optional: whatever goes wrong with a model here, the page is written
        return f"Logit-lens words are left out: {_sentence(error)}."


def words_of(lens: Lens | str | None, hook: str, atoms: Dictionary) -> dict[str, Any] | str:
    """The logit-lens words of atoms for the browser, or the sentence that says why there are none."""
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


def _atoms(path: Path, recipe: Recipe, hook: str, report: Report, lens: Lens | str | None) -> dict[str, Any]:
    atoms = load_atoms(path, hook=hook)
    seen = corpus(recipe, hook)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    _check_same(report, seen, heldout)
    identity = path / hook / IDENTITY_FILENAME
    scores = load_file(identity)["identity"] if identity.is_file() else None
    return {**browse(atoms, atoms.aip, seen, heldout, scores), "words": words_of(lens, hook, atoms)}


def _check_same(report: Report, seen: Corpus, heldout: Observation) -> None:
    """The recipe says where the prompts are, not what they were: changed prompts would change the split unnoticed."""
    n_train, kept, here = len(seen) - len(heldout), report.heldout, heldout.figures
    if kept is None or (report.n, kept.n) != (n_train, len(heldout)):
        n = kept.n if kept else None
        was = f"{report.n} training and {n} held-out activations, here are {n_train} and {len(heldout)}"
    elif not isclose(kept.r2, here.r2, rel_tol=_SAME_R2, abs_tol=_SAME_R2):
        was = f"held-out R² {kept.r2:.4f}, here it is {here.r2:.4f}"
    else:
        return
    raise AtomLensError(f"the prompts or the model are not those of the run: its report has {was}")
