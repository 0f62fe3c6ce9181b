"""The atoms browser's data by columns: how often each atom fires, where, and how it relates to the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_array
from torch import Tensor

from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.dictionaries.tsae.sae import TSAE
from atom_lens.evidence.certificates import atom_coherence, whitened_units
from atom_lens.evidence.codes import active_rows, codes_of
from atom_lens.evidence.measure import Observation
from atom_lens.evidence.window import threshold_window
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.contexts import Corpus
from atom_lens.storage.files import visible

_EACH = 4  # contexts shown of either split, per atom
_CONTEXTS = 16_384  # contexts of all atoms together, roughly; at least one of each atom
_BEFORE, _AFTER = 120, 60  # characters shown around the token read
_LONGEST = 120  # characters of a token, a subject, an answer
_BARS = 16
_NEIGHBOURS = 5


def browse(
    atoms: Dictionary,
    aip: AtomicInnerProduct,
    corpus: Corpus,
    heldout: Observation,
    identity: Float[Tensor, " F"] | None = None,
    other: str = "train",
) -> dict[str, Any]:
    """Columns of the browser, with one entry per atom unless stated otherwise.

    Args:
        atoms: the F atoms of one hook.
        aip: coherence is measured under it.
        corpus: the activations and their texts.
        heldout: `observe` of the atoms on the held-out rows of `corpus`.
        identity: the mean coherence of every atom with its partners in runs from other seeds, 0 for a dead one.
        other: the name of the activations that are not held out.

    Returns:
        Plain data for JSON, null where there is no number: "train" and "heldout" (activations it is active at, of
        "n_train" and "n_heldout"), "other", "mean" (coefficient), "bars" (histogram of coefficients from 0 to the
        atom's largest, 16 each), "identity", "margin", "near" and "coherence" (5 neighbours each), and contexts: atom i
        has entries at[i] to at[i + 1] of "row" and "value"; "row" is an index into the columns of "rows".
    """
    codes = codes_of(atoms, corpus.x)
    held = corpus.heldout.numpy()
    near, coherence = neighbours(atoms.W_dec.detach().cpu(), aip)
    firing = _firing(codes, held)
    if identity is not None:  # atoms that are dead on train were not matched: they have no number, rather than 0
        identity = identity.double().masked_fill(torch.tensor(firing["train"]) == 0, torch.nan)
    return {
        "n_train": int((~held).sum()),
        "n_heldout": int(held.sum()),
        "other": other,
        **firing,
        "identity": None if identity is None else compact(identity),
        "margin": compact(window_margin(atoms, aip, heldout)),
        "near": near.flatten().tolist(),
        "coherence": compact(coherence.flatten()),
        "neighbours": near.shape[1],
        **_contexts(codes, corpus),
    }


def compact(values: Float[Tensor, " n"] | np.ndarray) -> list[float | None]:
    """Four digits of each; None for NaN and infinity."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def neighbours(
    atoms: Float[Tensor, "F d"], metric: AtomicInnerProduct
) -> tuple[Int[Tensor, "F k"], Float[Tensor, "F k"]]:
    """For every atom up to 5 most coherent others, and |<d_i, d_j>_S|, largest first."""
    units = whitened_units(atoms.float(), metric)
    k = min(_NEIGHBOURS, len(units) - 1)
    found, values = [], []
    for start in range(0, len(units), 1024):
        part = (units[start : start + 1024] @ units.T).abs_().clamp_(max=1)
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -1
        best = part.topk(k, dim=1)
        found.append(best.indices)
        values.append(best.values.double())
    return torch.cat(found), torch.cat(values)


def window_margin(atoms: Dictionary, aip: AtomicInnerProduct, seen: Observation) -> Float[Tensor, " F"]:
    """How far each threshold lies inside its identifiability window, as a share of itself.

    Below 0 it lies outside; NaN for a silent atom.

    The window is that of the report's certificates: each atom's own extremes on the split `seen`.
    """
    margin = torch.full((len(seen.alive),), torch.nan, dtype=torch.float64)
    alive = seen.alive
    if not alive.any() or not isinstance(atoms, TSAE):  # other encoders have no such window
        return margin
    living = atoms.W_dec.detach().float()[alive]
    tau = atoms.threshold.detach()[alive].double() * aip.whiten(living).norm(dim=1)
    k_active = seen.k_atom[alive]
    window = threshold_window(
        tau,
        atom_coherence(living, aip).double(),
        torch.full_like(k_active, int(seen.l0.max())),
        k_active,
        seen.smallest[alive],
        float(seen.largest.max()),
    )
    inside = torch.minimum(window.tau - window.lower, window.upper - window.tau)
    margin[alive] = inside / tau.clamp(min=1e-12)
    return margin


def _firing(codes: csc_array, held: np.ndarray) -> dict[str, Any]:
    n_atoms = len(codes.indptr) - 1
    column = np.repeat(np.arange(n_atoms), np.diff(codes.indptr))
    out = held[codes.indices]
    size = np.abs(codes.data)
    every, heldout = (np.bincount(part, minlength=n_atoms) for part in (column, column[out]))
    largest = np.zeros(n_atoms)
    np.maximum.at(largest, column, size)
    bar = np.minimum((size / largest[column] * _BARS).astype(int), _BARS - 1)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(column, size, minlength=n_atoms) / every
    return {
        "train": (every - heldout).tolist(),
        "heldout": heldout.tolist(),
        "mean": compact(mean),
        "largest": compact(largest),
        "bars": np.bincount(column * _BARS + bar, minlength=n_atoms * _BARS).tolist(),
    }


def _contexts(codes: csc_array, corpus: Corpus) -> dict[str, Any]:
    """The strongest contexts of either split for every atom, and the texts that they need, once each."""
    held = corpus.heldout.numpy()
    kept: dict[int, int] = {}
    each = min(_EACH, max(1, _CONTEXTS // (len(codes.indptr) - 1)))
    at, row, value = [0], [], []
    for atom in range(len(codes.indptr) - 1):
        rows, values = active_rows(codes, atom)
        out = held[rows]
        shown = np.sort(np.concatenate([np.flatnonzero(side)[:each] for side in (out, ~out)]))
        row += [kept.setdefault(one, len(kept)) for one in rows[shown].tolist()]
        value.append(values[shown])
        at.append(len(row))
    texts = [_excerpt(corpus, one) for one in kept]
    return {
        "at": at,
        "row": row,
        "value": compact(np.concatenate(value)),
        "rows": {key: [text[key] for text in texts] for key in texts[0]} if texts else {},
    }


def _excerpt(corpus: Corpus, row: int) -> dict[str, Any]:
    # Three pieces instead of offsets: a browser counts characters beyond the basic plane twice.
    prompt, (start, end) = corpus.prompt(row), corpus.span(row)
    before, after = prompt.text[max(0, start - _BEFORE) : start], prompt.text[end : end + _AFTER]
    token = _cut(prompt.text[start:end])
    return {
        "before": ("…" if start > _BEFORE else "") + visible(before, keep="\n\t"),
        "token": token,
        "after": visible(after, keep="\n\t") + ("…" if end + _AFTER < len(prompt.text) else ""),
        "subject": _cut(prompt.subject) if prompt.subject else token.strip(),
        "answer": None if prompt.answer is None else _cut(prompt.answer),
        "heldout": int(corpus.heldout[row]),
    }


def _cut(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
