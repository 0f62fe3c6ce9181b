"""Kinds of latents on the same rows: a run's atoms, and what they have to be better than."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.baselines.bases import Basis, neurons
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.errors import AtomLensError
from atom_lens.evidence.codes import codes_of
from atom_lens.evidence.purity import purity
from atom_lens.recipe.contexts import Corpus
from atom_lens.recipe.recipe import Recipe
from atom_lens.storage.files import shown
from atom_lens.studies.compare.run import Compare
from atom_lens.studies.named import pretrained
from atom_lens.tensors.rows import Rows, mean_row

DATA_POINTS, DENSE_ATOMS, CONTROL = "data points", "atoms, as dense", "random rows"
NOT_ASKED = (DATA_POINTS, DENSE_ATOMS)  # of a judge, whose answers cost


def read_kinds(
    atoms: Metered, recipe: Recipe, read: Corpus, least: tuple[int, int], seed: int, without: Collection[str] = ()
) -> dict[str, csc_array]:
    """Codes of atoms, the recipe's features, neurons, random directions, data points and random rows, on the same rows.

    Only positive coefficients count as active, as in atoms and SAEs, whose codes are never negative: the two ends of a
    direction mean two things. Dense kinds (neurons, random directions) are active at their largest codes, at as many
    rows of either split as the median of the atoms that are active at `least` rows of it; so are the atoms' encoder
    rows without their thresholds, to compare at the same number of rows. Data points are the atoms of a pursuit with
    the atoms' mean L0. Random rows belong to no direction at all: they are the floor.

    Args:
        atoms: of a run.
        recipe: of the run.
        read: the rows.
        least: numbers of training and of held-out rows at which a latent must be active to count.
        seed: of the draws.
        without: data points or dense atoms, if they are not needed.

    Returns:
        Kind -> codes of its latents, shape (n, F), with an entry where a latent is active.

    Raises:
        AtomLensError: features of another width, or of another hook.
    """
    train = read.x.select(~read.heldout)
    generator = torch.Generator().manual_seed(seed)
    mean, n_atoms = mean_row(train).to(train.dtype), len(atoms.W_dec)
    codes = {"atoms": _positive(codes_of(atoms, read.x))}
    held = read.heldout.numpy()
    often = (np.diff(codes["atoms"][rows].indptr) for rows in (~held, held))
    m_train, m_heldout = (_median(part, enough) for part, enough in zip(often, least, strict=True))
    hook = str(atoms.cfg.metadata.hook_name)
    for features in recipe.section(Compare).features:
        one = pretrained(features, "cpu")
        if one.W_dec.shape[1] != train.shape[1]:
            raise AtomLensError(
                f"features {features.name!r} are {one.W_dec.shape[1]} wide, the activations of {hook} {train.shape[1]}"
            )
        theirs = one.cfg.metadata.hook_name
        if theirs not in (None, hook):
            raise AtomLensError(f"features {features.name!r} are of hook {shown(str(theirs))!r}, the atoms of {hook!r}")
        codes[f"features {features.name}"] = _positive(codes_of(one, read.x))
    directions = random_atoms(n_atoms, atoms.aip, generator)
    dense = {
        DENSE_ATOMS: Basis(atoms.W_enc.detach().T, mean),
        "neurons": neurons(train),
        # read by S d: the inner product under the metric
        "random directions": Basis(atoms.aip.whiten(atoms.aip.whiten(directions)).to(train.dtype), mean),
    }
    for name, basis in dense.items():
        if name not in without:
            codes[name] = strongest(basis, read.x, read.heldout, (m_train, m_heldout))
    if DATA_POINTS not in without:
        k = max(1, round(codes["atoms"].nnz / len(read)))
        points = data_atoms(train, n_atoms, mean, generator)
        codes[DATA_POINTS] = _positive(codes_of(Pursuit(points, mean, atoms.aip, min(k, *points.shape)), read.x))
    codes[CONTROL] = _random_rows(read.heldout, n_atoms, (m_train, m_heldout), seed)
    return codes


def _median(often: np.ndarray, least: int) -> int:
    """The median number of rows per latent, without latents below `least`, which are not measured."""
    counted = often[often >= least]
    return int(np.median(counted)) if len(counted) else least


@torch.no_grad()
def strongest(
    dictionary: Dictionary,
    x: Float[Rows, "n d"],
    heldout: Bool[Tensor, " n"],
    per_latent: tuple[int, int],
    batch: int = 1024,
) -> csc_array:
    """The largest codes of every latent: `per_latent` on training rows, and on held-out rows. Shape (n, F).

    An entry is how far a code lies above the smallest one kept for its latent, plus 1: it is positive, and larger
    where the code is larger, whatever the sign of the codes.
    """
    values, rows = [], []
    for m, which in zip(per_latent, (~heldout, heldout), strict=True):
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
    value, row = torch.cat(values).double(), torch.cat(rows)
    value = value - value.amin(dim=0) + 1
    latent = torch.arange(value.shape[1]).expand_as(value)
    entries = (row.flatten().numpy(), latent.flatten().numpy())
    return csc_array((value.flatten().numpy(), entries), shape=(len(heldout), value.shape[1]))


def _random_rows(heldout: Bool[Tensor, " n"], n_latents: int, per_latent: tuple[int, int], seed: int) -> csc_array:
    """Latents active at random: at as many rows of either split as the others, drawn without replacement."""
    draw = np.random.default_rng(seed)
    splits = [np.flatnonzero(~heldout.numpy()), np.flatnonzero(heldout.numpy())]
    chosen = [
        draw.choice(rows, min(m, len(rows)), replace=False)
        for _ in range(n_latents)
        for m, rows in zip(per_latent, splits, strict=True)
    ]
    rows = np.concatenate(chosen)
    latents = np.repeat(np.arange(n_latents), len(rows) // n_latents)
    # Strengths are drawn too: the strongest of these rows are random as well.
    return csc_array((draw.random(len(rows)) + 1, (rows, latents)), shape=(len(heldout), n_latents))


def _positive(codes: csc_array) -> csc_array:
    codes.data[codes.data < 0] = 0
    codes.eliminate_zeros()
    return codes


def label_purity(read: Corpus, codes_at: Callable[[Corpus], dict[str, csc_array]], seed: int) -> dict[str, Any] | None:
    """Purity of every kind for the prompts' answers, on the held-out rows and on all; None without answers.

    Only the last row with an answer of every subject is used, however many tokens and prompts the subject has.

    Args:
        read: the rows.
        codes_at: gives the codes of every kind at the rows used.
        seed: of the permutations.
    """
    prompts = [read.prompt(row) for row in range(len(read))]
    last = {prompt.group: row for row, prompt in enumerate(prompts) if prompt.answer is not None}
    which = torch.zeros(len(read), dtype=torch.bool)
    which[list(last.values())] = True
    labelled = Corpus(read.x.select(which), read.prompts, read.places[which], read.heldout[which])
    answers = np.array([str(labelled.prompt(row).answer) for row in range(len(labelled))])
    splits = {"heldout": labelled.heldout.numpy(), "all": np.ones(len(labelled), dtype=bool)}
    if any(len(np.unique(answers[rows])) < 2 for rows in splits.values()):
        return None
    codes = codes_at(labelled)
    found: dict[str, Any] = {}
    for split, rows in splits.items():
        names, labels = np.unique(answers[rows], return_inverse=True)
        scores = {
            kind: purity(csc_array(of[np.flatnonzero(rows)]), labels, seed=seed).figures for kind, of in codes.items()
        }
        commonest = float(np.bincount(labels).max() / len(labels))
        found[split] = {"n": len(labels), "labels": len(names), "commonest_label": commonest, "kinds": scores}
    return found
