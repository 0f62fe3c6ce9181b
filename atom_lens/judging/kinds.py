"""Kinds of units side by side on the same rows: a run's atoms, and what they have to be better than."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.evidence.bases import Basis, neurons
from atom_lens.evidence.measure import Dictionary
from atom_lens.evidence.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.evidence.purity import purity
from atom_lens.experiments.cells import Cell, pretrained
from atom_lens.experiments.contexts import Corpus, codes_of, corpus
from atom_lens.rows import Rows, mean_row
from atom_lens.sharing.load import load_atoms
from atom_lens.training.recipe import Recipe

DATA_POINTS, DENSE_ATOMS, CONTROL = "data points", "atoms, as dense", "random rows"
NOT_ASKED = (DATA_POINTS, DENSE_ATOMS)  # of a judge, whose answers cost


@dataclass(frozen=True)
class Kinds:
    """What is judged.

    Attributes:
        recipe: of the run.
        hook: where its atoms were read.
        corpus: the rows.
        codes: kind -> codes of its units, shape (n, F), with an entry where a unit is active.
        per_unit: rows at which the median atom is active, and each unit of a dense kind: (of the training rows, of
            the held-out ones).
    """

    recipe: Recipe
    hook: str
    corpus: Corpus
    codes: dict[str, csc_array]
    per_unit: tuple[int, int]


def read_kinds(folder: Path, recipe: Recipe, seed: int) -> Kinds:
    """Codes of atoms, the recipe's features, neurons, random directions, data points and random rows, on the same rows.

    Only what lies on the positive side of a unit counts as active, as it does for atoms and SAEs, whose codes are
    never negative: a direction's two ends are two things. Dense kinds (neurons, random directions) are active at
    their largest codes, at as many rows of either split as the median atom; so are the atoms' encoder rows, without
    their thresholds, to compare at the same number of rows. Data points are the atoms of a pursuit
    with the atoms' mean L0. Random rows are no units at all: the floor.

    Args:
        folder: of the atoms.
        recipe: of their run.
        seed: of the draws.

    Raises:
        ValueError: the hook is not one of the recipe's, or features are of another width.
    """
    atoms = load_atoms(folder)
    hook = str(atoms.cfg.metadata.hook_name)
    read = corpus(recipe, hook)
    train = read.x.select(~read.heldout)
    generator = torch.Generator().manual_seed(seed)
    mean, n_atoms = mean_row(train).to(train.dtype), len(atoms.W_dec)
    codes = {"atoms": _positive(codes_of(atoms, read.x))}
    held = read.heldout.numpy()
    often = [np.diff(part.indptr) for part in (codes["atoms"][~held], codes["atoms"][held])]
    m_train, m_heldout = (max(1, int(np.median(part[part > 0]))) if part.any() else 1 for part in often)
    for features in recipe.compare.features:
        one = pretrained(features, "cpu")
        if one.W_dec.shape[1] != train.shape[1]:
            raise ValueError(
                f"features {features.name!r} are {one.W_dec.shape[1]} wide, the activations of {hook} {train.shape[1]}"
            )
        codes[f"features {features.name}"] = _positive(codes_of(one, read.x))
    directions = random_atoms(n_atoms, atoms.aip, generator)
    dense = {
        DENSE_ATOMS: Basis(atoms.W_enc.detach().T, mean),
        "neurons": neurons(train),
        # S d as the row that is read: the inner product under the metric
        "random directions": Basis(atoms.aip.whiten(atoms.aip.whiten(directions)).to(train.dtype), mean),
    }
    for name, basis in dense.items():
        codes[name] = strongest(basis, read.x, read.heldout, (m_train, m_heldout))
    k = max(1, round(codes["atoms"].nnz / len(read)))
    points = data_atoms(train, n_atoms, mean, generator)
    codes[DATA_POINTS] = _positive(codes_of(Pursuit(points, mean, atoms.aip, min(k, *points.shape)), read.x))
    codes[CONTROL] = _random_rows(read.heldout, n_atoms, (m_train, m_heldout), seed)
    return Kinds(recipe, hook, read, codes, (m_train, m_heldout))


@torch.no_grad()
def strongest(
    dictionary: Dictionary,
    x: Float[Rows, "n d"],
    heldout: Bool[Tensor, " n"],
    per_unit: tuple[int, int],
    batch: int = 1024,
) -> csc_array:
    """Of every unit only the largest codes: `per_unit` of the training rows, and of the held-out rows. Shape (n, F)."""
    values, rows = [], []
    for m, which in zip(per_unit, (~heldout, heldout), strict=True):
        at = which.nonzero().squeeze(1)
        best = torch.empty(0, len(dictionary.W_dec))
        index = torch.empty(0, len(dictionary.W_dec), dtype=torch.long)
        for part in at.split(batch):
            best = torch.cat([best, dictionary.encode(x[part]).float().cpu()])
            index = torch.cat([index, part[:, None].expand(-1, best.shape[1])])
            best, order = best.topk(min(m, len(best)), dim=0)
            index = index.gather(0, order)
        values.append(best)
        rows.append(index)
    value, row = torch.cat(values), torch.cat(rows)
    unit = torch.arange(value.shape[1]).expand_as(value)
    entries = (row.flatten().numpy(), unit.flatten().numpy())
    return csc_array((value.flatten().numpy(), entries), shape=(len(heldout), value.shape[1]))


def _random_rows(heldout: Bool[Tensor, " n"], n_units: int, per_unit: tuple[int, int], seed: int) -> csc_array:
    """Units that are active anywhere: as many rows of either split as the others, drawn without replacement."""
    draw = np.random.default_rng(seed)
    splits = [np.flatnonzero(~heldout.numpy()), np.flatnonzero(heldout.numpy())]
    chosen = [
        draw.choice(rows, min(m, len(rows)), replace=False)
        for _ in range(n_units)
        for m, rows in zip(per_unit, splits, strict=True)
    ]
    rows = np.concatenate(chosen)
    units = np.repeat(np.arange(n_units), len(rows) // n_units)
    # Strengths are drawn too: the strongest of these rows are random as well.
    return csc_array((draw.random(len(rows)) + 1, (rows, units)), shape=(len(heldout), n_units))


def _positive(codes: csc_array) -> csc_array:
    codes.data[codes.data < 0] = 0
    codes.eliminate_zeros()
    return codes


def label_purity(kinds: Kinds, seed: int) -> Cell | None:
    """Purity of every kind for the prompts' answers, on the held-out rows and on all; None where there are none."""
    answers = [kinds.corpus.prompt(row).answer for row in range(len(kinds.corpus))]
    labelled = np.array([answer is not None for answer in answers])
    splits = {"heldout": labelled & kinds.corpus.heldout.numpy(), "all": labelled}
    if any(len({answers[row] for row in np.flatnonzero(rows)}) < 2 for rows in splits.values()):
        return None
    found: Cell = {}
    for split, rows in splits.items():
        names, labels = np.unique([str(answers[row]) for row in np.flatnonzero(rows)], return_inverse=True)
        scores = {
            kind: purity(csc_array(codes[np.flatnonzero(rows)]), labels, seed=seed).figures
            for kind, codes in kinds.codes.items()
        }
        commonest = float(np.bincount(labels).max() / len(labels))
        found[split] = {"n": len(labels), "labels": len(names), "commonest_label": commonest, "kinds": scores}
    return found
