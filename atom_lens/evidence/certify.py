"""Certify: every certificate of one dictionary on one split."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.evidence.certificates import atom_coherence, certify_codes, rip_bound, unique_atoms, whitened_units
from atom_lens.evidence.measure import Observation, observe
from atom_lens.evidence.recovery import basis_pursuit_agrees, pursuit_agrees
from atom_lens.evidence.results import Agreement, Certificates, Codes, Eps, Recovery, Rip, Window
from atom_lens.evidence.window import threshold_window
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.tensors.checks import checked_seed
from atom_lens.tensors.rows import Rows

# Codes with more active atoms are not pursued: the solvers take K steps, each on a K x K system.
_PURSUED = 64


@torch.no_grad()
def certify(
    dictionary: Dictionary,
    x: Float[Tensor | Rows, "n d"],
    metric: AtomicInnerProduct,
    seen: Observation | None = None,
    *,
    sample: int = 256,
    seed: int = 0,
) -> Certificates:
    """Every certificate of a dictionary on one split, as in report.json.

    Args:
        dictionary: a TSAE, any sae-lens SAE, or anything with `W_dec`, `encode` and `decode`.
        x: activations, shape (n, d).
        metric: the AIP.
        seen: `observe(dictionary, x, metric)`, if it is known already.
        sample: how many codes are certified one by one; those with at most 64 active atoms are pursued, too.
        seed: of the draw of the sample.

    Returns:
        The certificates; `window` only for a dictionary with thresholds, and all None when no atom is alive.
    """
    x = check_rows(x, "x", metric.width)
    seen = observe(dictionary, x, metric) if seen is None else seen
    device = dictionary.W_dec.device
    metric, alive = metric.to(device), seen.alive.to(device)
    if not alive.any():
        return Certificates()
    atoms = dictionary.W_dec.detach().float()[alive]
    coherence = atom_coherence(atoms, metric)
    most = int(seen.l0.max())
    generator = torch.Generator().manual_seed(checked_seed(seed))
    rows = torch.randperm(len(x), generator=generator)[:sample]
    sampled = x[rows.to(x.device)].to(device)
    codes = dictionary.encode(sampled.to(dictionary.W_dec.dtype))
    certified = certify_codes(atoms, codes[:, alive], metric)
    spoken = certified.k > 0
    tau, window = getattr(dictionary, "threshold", None), None
    if isinstance(tau, Tensor) and not isinstance(dictionary, PursuitSAE):
        norms = metric.whiten(atoms).norm(dim=1)
        window = _window(seen, coherence.double().cpu(), (tau.detach()[alive].double() * norms).cpu())
    return Certificates(
        rip=Rip(k=most, bound=rip_bound(seen.found.max_coherence, most)),
        unique_atoms=float(unique_atoms(coherence, seen.k_atom.to(device)[alive]).double().mean()),
        codes=Codes(
            n=int(spoken.sum()),
            babel=_share(certified.babel[spoken]),
            exact_recovery=_share(certified.exact_recovery[spoken]),
        ),
        recovery=_recovery(dictionary, sampled, codes, alive, metric, generator),
        window=window,
    )


def _window(seen: Observation, coherence: Float[Tensor, " F"], tau: Float[Tensor, " F"]) -> Window:
    """The window from each atom's own extremes, and how far the thresholds are from it."""
    alive = seen.alive
    smallest, k_active = seen.smallest[alive], seen.k_atom[alive]
    k, delta_max = int(seen.l0.max()), float(seen.largest.max())
    window = threshold_window(tau, coherence, torch.full_like(k_active, k), k_active, smallest, delta_max)
    return Window(
        eps=Eps(median=float(coherence.median()), max=float(coherence.max())),
        k=k,
        delta_min=float(smallest.min()),
        delta_max=delta_max,
        feasible=_share(window.feasible),
        inside=_share(window.inside),
        outside_by_median=float(window.outside_by.median()),
        outside_by_median_tau=float((window.outside_by / tau.abs().clamp(min=1e-12)).median()),
    )


def _recovery(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    codes: Float[Tensor, "n F"],
    alive: Bool[Tensor, " F"],
    metric: AtomicInnerProduct,
    generator: torch.Generator,
) -> Recovery | None:
    atoms = dictionary.W_dec.detach().float()[alive]
    active = codes[:, alive] != 0
    k = active.sum(dim=1)
    rows = ((k > 0) & (k <= min(_PURSUED, *atoms.shape))).nonzero()[:, 0]
    if not len(rows):
        return None
    reconstruction = dictionary.decode(codes[rows])
    # What the bias alone reconstructs is not part of the code.
    bias = dictionary.decode(torch.zeros_like(codes[:1]))
    units = whitened_units(atoms, metric)
    exact, given = (metric.whiten(part - bias).to(units.dtype) for part in (reconstruction, x[rows]))
    # Noise of the size of the residual, in a random direction: a code that is read again does not depend on it.
    noise = torch.randn(given.shape, generator=generator, dtype=given.dtype).to(given.device)
    noise *= ((given - exact).norm(dim=1) / noise.norm(dim=1))[:, None]
    disturbed = reconstruction + metric.unwhiten(noise).to(reconstruction.dtype)
    again = dictionary.encode(disturbed.to(dictionary.W_dec.dtype))[:, alive] != 0
    kept = (again & active[rows]).sum(dim=1) / k[rows]
    same = (again == active[rows]).all(dim=1)
    return Recovery(
        n=len(rows),
        omp_reconstruction=_agreement(pursuit_agrees(exact, units, active[rows])),
        bp_reconstruction=_agreement(basis_pursuit_agrees(exact, units, active[rows])),
        omp_activation=_agreement(pursuit_agrees(given, units, active[rows])),
        bp_activation=_agreement(basis_pursuit_agrees(given, units, active[rows], steps=4)),
        under_noise=Agreement(same_support=_share(same), shared_atoms=float(kept.double().mean())),
    )


def _agreement(shares: Float[Tensor, " n"]) -> Agreement:
    return Agreement(same_support=_share(shares == 1), shared_atoms=float(shares.mean()))


def _share(flags: Bool[Tensor, " n"]) -> float | None:
    return float(flags.double().mean()) if len(flags) else None
