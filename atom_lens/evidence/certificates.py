"""Certificates: what coherence alone proves about atoms and codes (theory.md sections 2 and 3).

Everything is taken under the metric, over atoms that are alive, tile by tile: neither F x F nor n x F x F exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atom_lens.evidence.measure import Dictionary, Observation, observe
from atom_lens.evidence.recovery import basis_pursuit_agrees, pursuit_agrees
from atom_lens.geometry import AtomicInnerProduct, check_rows, unit_rows

# Float32 cosines are off by less than this; a certificate must hold with the error added.
_MARGIN = 2e-6
# Numbers of a batch of gathered Gram rows, (codes, K, F).
_CELLS = 1 << 25
# Codes with more active atoms are not pursued: the solvers take K steps, each on a K x K system.
_PURSUED = 64


def whitened_units(atoms: Float[Tensor, "F d"], metric: AtomicInnerProduct | None) -> Float[Tensor, "F d"]:
    """Atoms of unit norm in the space where the AIP is the Euclidean inner product; same dtype."""
    check_rows(atoms, "atoms", None if metric is None else metric.width)
    whitened = atoms if metric is None else torch.cat([metric.whiten(part) for part in atoms.split(8192)])
    return unit_rows(whitened).to(atoms.dtype)


def atom_coherence(
    atoms: Float[Tensor, "F d"], metric: AtomicInnerProduct | None = None, tile: int = 4096
) -> Float[Tensor, " F"]:
    """Of every atom, the largest coherence with another: max_j |<d_i, d_j>_S|. Shape (F,); 0 for a single atom."""
    units = whitened_units(atoms, metric)
    largest = torch.zeros(len(units), dtype=units.dtype, device=units.device)
    for i in range(0, len(units), tile):
        for j in range(i, len(units), tile):
            coherence = (units[i : i + tile] @ units[j : j + tile].T).abs_()
            if i == j:
                coherence.fill_diagonal_(0)
            largest[i : i + tile] = torch.maximum(largest[i : i + tile], coherence.amax(dim=1))
            largest[j : j + tile] = torch.maximum(largest[j : j + tile], coherence.amax(dim=0))
    return largest.clamp_(max=1)


def rip_bound(coherence: float, k: int) -> float:
    """delta_K <= (K - 1) mu: below 1 no two K/2-sparse codes have the same reconstruction (theory.md section 2)."""
    return max(k - 1, 0) * coherence


def unique_atoms(coherence: Float[Tensor, " F"], k: Int[Tensor, " F"]) -> Bool[Tensor, " F"]:
    """Strict, per atom: max_j |<d_i, d_j>_S| < 1 / (2 K_i - 1), K_i the largest L0 of a code in which i is active.

    Args:
        coherence: `atom_coherence`, shape (F,).
        k: per atom, at least 1, shape (F,).
    """
    if coherence.shape != k.shape or int(k.min()) < 1:
        raise ValueError(f"k must hold one number >= 1 for each of {len(coherence)} atoms, got shape {tuple(k.shape)}")
    return coherence.double() < 1 / (2 * k.double() - 1) - _MARGIN


@dataclass(frozen=True)
class CodeCertificates:
    """Per code, whether its own support proves it unique. Shape (n,) each; an empty code proves nothing.

    Attributes:
        babel: max_{j outside} mu_1(j) + max_{i inside} mu_1(i) < 1, with mu_1 the coherence summed over the support
            (the Babel condition of Tropp 2004 on this one support). Implies `exact_recovery`.
        exact_recovery: max_{j outside} ||D_L^+ d_j||_1 < 1: matching pursuit and basis pursuit both find the code.
        k: size of the support.
    """

    babel: Bool[Tensor, " n"]
    exact_recovery: Bool[Tensor, " n"]
    k: Int[Tensor, " n"]


def certify_codes(
    atoms: Float[Tensor, "F d"], codes: Float[Tensor, "n F"], metric: AtomicInnerProduct | None = None
) -> CodeCertificates:
    """Which codes their own support certifies as unique.

    Args:
        atoms: rows, shape (F, d).
        codes: over these atoms, shape (n, F); only their supports matter.
        metric: the AIP, or None for Euclidean coherence.
    """
    if codes.shape[1:] != atoms.shape[:1]:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (rows, {len(atoms)})")
    units = whitened_units(atoms, metric)
    k = (codes != 0).sum(dim=1)
    babel, exact = torch.zeros_like(k, dtype=torch.bool), torch.zeros_like(k, dtype=torch.bool)
    for rows, size in _equal_sizes(k, len(units)):
        if size > units.shape[1]:
            continue  # more atoms than dimensions are linearly dependent: no such support is unique
        support = (codes[rows] != 0).nonzero()[:, 1].view(len(rows), size)
        inside = units[support]
        cross = einsum(inside, units, "n k d, F d -> n k F")
        gram = torch.gather(cross, 2, support[:, None, :].expand(-1, size, -1)).double()
        summed = cross.abs().sum(dim=1)
        largest_inside = summed.gather(1, support).amax(dim=1) - 1  # less the atom with itself
        outside = summed.scatter(1, support, 0).amax(dim=1)
        babel[rows] = largest_inside + outside < 1 - size * _MARGIN
        solved, info = torch.linalg.solve_ex(gram, cross.double())
        weights = solved.abs().sum(dim=1).scatter(1, support, 0).amax(dim=1)
        independent = torch.linalg.eigvalsh(gram)[:, 0] > size * _MARGIN
        exact[rows] = independent & (info == 0) & (weights < 1 - size * _MARGIN)
    return CodeCertificates(babel, exact, k)


def _equal_sizes(k: Int[Tensor, " n"], n_atoms: int) -> Iterator[tuple[Int[Tensor, " rows"], int]]:
    """Batches of rows whose codes have the same number of active atoms."""
    for size in k.unique().tolist():
        if size:
            rows = (k == size).nonzero()[:, 0]
            for part in rows.split(max(1, _CELLS // (size * n_atoms))):
                yield part, size


@dataclass(frozen=True)
class ThresholdWindow:
    """Where each threshold lies against eps K delta_max < tau < delta_min - eps (K - 1) delta_max. Shape (F,) each.

    All in units of coefficients of atoms of unit AIP norm (theory.md section 3). Strict inequalities.
    """

    lower: Float[Tensor, " F"]
    upper: Float[Tensor, " F"]
    tau: Float[Tensor, " F"]

    @property
    def feasible(self) -> Bool[Tensor, " F"]:
        """Whether any threshold would do."""
        return self.lower < self.upper

    @property
    def inside(self) -> Bool[Tensor, " F"]:
        return (self.lower < self.tau) & (self.tau < self.upper)

    @property
    def outside_by(self) -> Float[Tensor, " F"]:
        """How far tau is from satisfying both sides, the larger shortfall; 0 where it is inside."""
        return torch.maximum(self.lower - self.tau, self.tau - self.upper).clamp(min=0)


def threshold_window(
    tau: Float[Tensor, " F"],
    eps: Float[Tensor, " F"],
    k: Int[Tensor, " F"],
    k_active: Int[Tensor, " F"],
    delta_min: Float[Tensor, " F"],
    delta_max: float,
) -> ThresholdWindow:
    """The window of the identifiability theorem, per atom.

    Args:
        tau: thresholds.
        eps: coherence bound of each atom.
        k: largest L0 of any code (an atom that should be silent hears this many others).
        k_active: largest L0 of a code in which the atom is active (it hears one less).
        delta_min: smallest coefficient of the atom.
        delta_max: largest coefficient of any atom.
    """
    return ThresholdWindow(eps * k * delta_max, delta_min - eps * (k_active - 1) * delta_max, tau)


@torch.no_grad()
def certify(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    metric: AtomicInnerProduct,
    seen: Observation | None = None,
    *,
    sample: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Every certificate of a dictionary on one split, as report.json holds it.

    Args:
        dictionary: a TSAE, any sae-lens SAE, or anything with `W_dec`, `encode` and `decode`.
        x: activations, shape (n, d).
        metric: the AIP.
        seen: `observe(dictionary, x, metric)`, where it is there already.
        sample: codes that are certified one by one; and pursued, of those with at most 64 active atoms.
        seed: of the draw of the sample.

    Returns:
        The fields of `certificates` (docs/report.md). `window` only for a dictionary with thresholds, and None
        everywhere when no atom is alive.
    """
    seen = observe(dictionary, x, metric) if seen is None else seen
    device = dictionary.W_dec.device
    metric, alive = metric.to(device), seen.alive.to(device)
    if not alive.any():
        return {"rip": None, "unique_atoms": None, "codes": None, "recovery": None, "window": None}
    atoms = dictionary.W_dec.detach().float()[alive]
    coherence = atom_coherence(atoms, metric)
    most = int(seen.l0.max())
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[:sample]
    codes = dictionary.encode(x[rows.to(x.device)].to(device))[:, alive]
    certified = certify_codes(atoms, codes, metric)
    spoken = certified.k > 0
    found: dict[str, Any] = {
        "rip": {"k": most, "bound": rip_bound(seen.found.max_coherence, most)},
        "unique_atoms": float(unique_atoms(coherence, seen.k_atom.to(device)[alive]).double().mean()),
        "codes": {
            "n": int(spoken.sum()),
            "babel": _share(certified.babel[spoken]),
            "exact_recovery": _share(certified.exact_recovery[spoken]),
        },
        "recovery": _recovery(dictionary, x[rows.to(x.device)].to(device), codes, atoms, metric),
        "window": None,
    }
    tau = getattr(dictionary, "threshold", None)
    if isinstance(tau, Tensor):
        norms = metric.whiten(atoms).norm(dim=1)
        found["window"] = _window(seen, coherence.double().cpu(), (tau.detach()[alive].double() * norms).cpu())
    return found


def _window(seen: Observation, coherence: Float[Tensor, " F"], tau: Float[Tensor, " F"]) -> dict[str, Any]:
    """The window with each atom's own extremes, and how far the thresholds are from it."""
    alive = seen.alive
    smallest, k_active = seen.smallest[alive], seen.k_atom[alive]
    k, delta_max = int(seen.l0.max()), float(seen.largest.max())
    window = threshold_window(tau, coherence, torch.full_like(k_active, k), k_active, smallest, delta_max)
    return {
        "eps": {"median": float(coherence.median()), "max": float(coherence.max())},
        "k": k,
        "delta_min": float(smallest.min()),
        "delta_max": delta_max,
        "feasible": _share(window.feasible),
        "inside": _share(window.inside),
        "outside_by_median": float(window.outside_by.median()),
        "outside_by_median_tau": float((window.outside_by / tau.abs().clamp(min=1e-12)).median()),
    }


def _recovery(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    codes: Float[Tensor, "n F"],
    atoms: Float[Tensor, "F d"],
    metric: AtomicInnerProduct,
) -> dict[str, Any] | None:
    active = codes != 0
    k = active.sum(dim=1)
    rows = ((k > 0) & (k <= min(_PURSUED, *atoms.shape))).nonzero()[:, 0]
    if not len(rows):
        return None
    reconstruction = dictionary.decode(dictionary.encode(x[rows]))
    # What the bias alone gives back is no part of the code.
    bias = dictionary.decode(torch.zeros(1, len(dictionary.W_dec), device=x.device, dtype=codes.dtype))
    units = whitened_units(atoms, metric)
    exact, given = (metric.whiten(part - bias).to(units.dtype) for part in (reconstruction, x[rows]))
    found: dict[str, Any] = {"n": len(rows)}
    agreements = {
        "omp_reconstruction": pursuit_agrees(exact, units, active[rows]),
        "bp_reconstruction": basis_pursuit_agrees(exact, units, active[rows]),
        "omp_activation": pursuit_agrees(given, units, active[rows]),
    }
    for name, agreement in agreements.items():
        found[name] = {"same_support": _share(agreement == 1), "shared_atoms": float(agreement.mean())}
    return found


def _share(flags: Bool[Tensor, " n"]) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
