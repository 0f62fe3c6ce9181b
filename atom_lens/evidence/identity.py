"""Identity: are the atoms of one training run those of another? (theory.md section 4)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.stats import beta
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.evidence.certificates import whitened_units
from atom_lens.evidence.results import IdentityFigures
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.tensors.checks import Mask, mask

# Up to here the full matrix of coherences is matched (0.13 GB in float64); above it only the closest candidates.
_DENSE_MOST = 4096
_CANDIDATES = 32


@dataclass(frozen=True)
class Matching:
    """A one-to-one matching of the atoms of two dictionaries, of largest total coherence.

    Attributes:
        partner: of every atom of the first, its atom of the second, shape (F,); -1 where it has none.
        coherence: |<d_i, d_partner(i)>_S|, shape (F,); 0 where it has none.
    """

    partner: Int[Tensor, " F"]
    coherence: Float[Tensor, " F"]


@torch.no_grad()
def match(
    first: Float[Tensor | np.ndarray, "F d"],
    second: Float[Tensor | np.ndarray, "G d"],
    metric: AtomicInnerProduct | None = None,
    dense_most: int = _DENSE_MOST,
) -> Matching:
    """Match atoms one to one under |<., .>_S|, exactly up to `dense_most` atoms (Hungarian algorithm).

    Above that each atom can be matched only to one of its 32 most coherent candidates or to none, which loses almost
    nothing where dictionaries agree, and gives a lower bound where they do not.

    Args:
        first, second: rows, shape (F, d) and (G, d).
        metric: the AIP, or None for Euclidean coherence.
        dense_most: the largest number of atoms matched exactly.
    """
    u, v = whitened_units(first, metric), whitened_units(second, metric)
    if u.shape[1] != v.shape[1]:
        raise AtomLensError(f"the dictionaries have widths {u.shape[1]} and {v.shape[1]}, expected one width")
    v = v.to(u)
    partner = torch.full((len(u),), -1)
    coherence = torch.zeros(len(u), dtype=torch.float64)
    if max(len(u), len(v)) <= dense_most:
        table = (u @ v.T).abs().double().cpu()
        rows, columns = (torch.from_numpy(side) for side in linear_sum_assignment(table.numpy(), maximize=True))
        partner[rows], coherence[rows] = columns, table[rows, columns].clamp(max=1)
        return Matching(partner, coherence)
    # Candidates of either side, and for each row a column of its own that means having no partner.
    ahead, back = _closest(u, v), _closest(v, u)
    pairs = torch.cat([ahead, back.flip(0)], dim=1).unique(dim=1)
    values = torch.cat([(u[i] * v[j]).sum(dim=1).abs() for i, j in zip(*(s.split(65536) for s in pairs), strict=True)])
    own = torch.arange(len(u))
    row, column = torch.cat([pairs[0].cpu(), own]), torch.cat([pairs[1].cpu(), len(v) + own])
    # A weight of zero would be no edge at all.
    weight = torch.cat([2 - values.double().cpu(), torch.full((len(u),), 2.0, dtype=torch.float64)])
    graph = coo_array((weight.numpy(), (row.numpy(), column.numpy())), shape=(len(u), len(v) + len(u)))
    rows, columns = (torch.from_numpy(side).long() for side in min_weight_full_bipartite_matching(graph.tocsr()))
    real = columns < len(v)
    partner[rows[real]] = columns[real]
    coherence[rows[real]] = (u[rows[real]] * v[columns[real]]).sum(dim=1).abs().double().cpu().clamp(max=1)
    return Matching(partner, coherence)


def _closest(u: Float[Tensor, "F d"], v: Float[Tensor, "G d"]) -> Int[Tensor, "2 edges"]:
    k = min(_CANDIDATES, len(v))
    columns = torch.cat([(part @ v.T).abs_().topk(k, dim=1).indices for part in u.split(2048)])
    return torch.stack([torch.arange(len(u), device=u.device).repeat_interleave(k), columns.flatten()])


def extreme_level(n_atoms: int, width: int, chance: float = 0.01) -> float:
    """The coherence that the best of `n_atoms` random directions exceeds with probability `chance`.

    Of one pair the squared cosine is Beta(1/2, (d-1)/2) distributed; the best of F is above t unless all are below.
    """
    each = -np.expm1(np.log1p(-chance) / n_atoms)
    return float(np.sqrt(beta.isf(each, 0.5, (width - 1) / 2)))


@dataclass(frozen=True)
class Identity:
    """Agreement of several training runs, over all pairs of them.

    Attributes:
        pw_mcc: pairwise mean correlation coefficient: mean coherence of matched atoms.
        above_09: share of atoms matched at a coherence above 0.9.
        level: the coherence that the best of as many random directions exceeds once in a hundred times.
        above_level: share of atoms matched above it.
        pairs: PW-MCC of each pair of runs.
        scores: per run the mean coherence of every atom with its partners in the other runs, shape (F,); dead atoms: 0.
    """

    pw_mcc: float
    above_09: float
    level: float
    above_level: float
    pairs: list[float]
    scores: list[Float[Tensor, " F"]]

    @property
    def figures(self) -> IdentityFigures:
        """As in report.json."""
        names = ("pw_mcc", "above_09", "level", "above_level", "pairs")
        return IdentityFigures(runs=len(self.scores), **{name: getattr(self, name) for name in names})


def identity(
    dictionaries: Sequence[Float[Tensor | np.ndarray, "F d"]],
    metric: AtomicInnerProduct | None = None,
    alive: Sequence[Mask] | None = None,
) -> Identity:
    """Match the atoms of independent runs and count how many are the same.

    Args:
        dictionaries: at least two, rows of shape (F, d); F may differ.
        metric: the AIP, or None for Euclidean coherence.
        alive: which atoms fired, shape (F,) each. Dead atoms never left their start, so they are neither matched nor
            counted.

    Raises:
        AtomLensError: fewer than two runs, or a run without living atoms.
    """
    if len(dictionaries) < 2:
        raise AtomLensError(f"identity needs at least 2 runs, got {len(dictionaries)}")
    dictionaries = [check_rows(d, f"dictionary {i}") for i, d in enumerate(dictionaries)]
    if len(widths := {d.shape[1] for d in dictionaries}) > 1:
        raise AtomLensError(f"the dictionaries have widths {sorted(widths)}, expected one width")
    if alive is not None and len(alive) != len(dictionaries):
        raise AtomLensError(f"alive has {len(alive)} masks, expected one for each of {len(dictionaries)} runs")
    masks = [[True] * len(d) for d in dictionaries] if alive is None else alive
    living = [mask(m, len(d), f"alive[{i}]") for i, (m, d) in enumerate(zip(masks, dictionaries, strict=True))]
    if not all(one.any() for one in living):
        raise AtomLensError("a run has no living atoms: there is nothing to match")
    alone = [d[one.to(d.device)] for d, one in zip(dictionaries, living, strict=True)]
    scores = [torch.zeros(len(d), dtype=torch.float64) for d in dictionaries]
    matched, pairs = [], []
    for a, b in combinations(range(len(dictionaries)), 2):
        found = match(alone[a], alone[b], metric)
        back = torch.zeros(int(living[b].sum()), dtype=torch.float64)
        real = found.partner >= 0
        back[found.partner[real]] = found.coherence[real]
        for run, coherence in ((a, found.coherence), (b, back)):
            scores[run][living[run]] += coherence / (len(dictionaries) - 1)
        # Atoms in excess of the smaller run have no partner, which is not a disagreement of the others.
        best = found.coherence.sort(descending=True).values[: min(len(found.coherence), len(back))]
        matched.append(best)
        pairs.append(float(best.mean()))
    every = torch.cat(matched)
    most = max(int(one.sum()) for one in living)
    level = extreme_level(most, dictionaries[0].shape[1])
    return Identity(
        pw_mcc=float(np.mean(pairs)),
        above_09=float((every > 0.9).double().mean()),
        level=level,
        above_level=float((every > level).double().mean()),
        pairs=pairs,
        scores=scores,
    )
