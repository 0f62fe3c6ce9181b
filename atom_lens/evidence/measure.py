"""What a dictionary does to one split of the data, row by row, from a single pass over its codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.protocol import check_folded
from atom_lens.errors import AtomLensError
from atom_lens.evidence.faithfulness import SquaredSums, explained
from atom_lens.evidence.results import L0, Coherence, Figures
from atom_lens.evidence.stability import Stability, stability
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.tensors import parallel
from atom_lens.tensors.rows import Rows


@dataclass(frozen=True)
class Observation:
    """Codes of one split, reduced to what the figures need. Sums of squares are per row, float64, on the CPU.

    Attributes:
        residual, residual_aip: ||x - x_hat||² in either norm, shape (n,).
        total, total_aip: ||x - mean(x)||² in either norm, shape (n,).
        l0: K_i, shape (n,).
        k_atom: of every atom, the largest L0 of a code in which it is active, shape (F,); 0 for a dead one.
        smallest, largest: of every atom, its extreme coefficients on unit AIP norm, shape (F,); 0 for a dead one.
        found: stability of the living atoms with these codes.
    """

    residual: Float[Tensor, " n"]
    residual_aip: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    total_aip: Float[Tensor, " n"]
    l0: Int[Tensor, " n"]
    k_atom: Int[Tensor, " F"]
    smallest: Float[Tensor, " F"]
    largest: Float[Tensor, " F"]
    found: Stability

    def __len__(self) -> int:
        return len(self.l0)

    @property
    def alive(self) -> Bool[Tensor, " F"]:
        """Atoms that fired."""
        return self.k_atom > 0

    @cached_property
    def figures(self) -> Figures:
        """R², q*, L0, empty codes, dead atoms and coherence."""
        found = self.found
        return Figures(
            n=len(self),
            r2=explained(self.residual, self.total),
            r2_aip=explained(self.residual_aip, self.total_aip),
            q_star=found.q_star,
            l0=L0(
                mean=float(self.l0.double().mean()),
                p50=found.l0_quantile(0.5),
                p998=found.l0_quantile(0.998),
                max=int(self.l0.max()),
            ),
            empty_codes=found.empty_codes,
            dead_atoms=found.dead_atoms,
            coherence=Coherence(
                p50=found.coherence_quantile(0.5), p998=found.coherence_quantile(0.998), max=found.max_coherence
            ),
        )


@torch.no_grad()
def observe(
    dictionary: Dictionary, x: Float[Tensor | Rows | np.ndarray, "n d"], metric: AtomicInnerProduct, batch: int = 1024
) -> Observation:
    """Encode and decode `x` once, and keep what the evidence is made of.

    Args:
        dictionary: rows `W_dec` of shape (F, d), `encode` to codes (n, F), `decode` back to (n, d).
        x: activations of one split, shape (n, d).
        metric: the AIP the figures are taken under.
        batch: rows encoded at a time.

    Raises:
        AtomLensError: widths differ, values are not finite, or all rows of `x` are equal.
    """
    check_folded(dictionary, "the dictionary")
    if batch < 1:
        raise AtomLensError(f"batch is {batch}, allowed is at least 1")
    x = check_rows(x, "x", metric.width)
    atoms = check_rows(dictionary.W_dec, "the dictionary", metric.width).detach()
    device = atoms.device
    metric = metric.to(device)
    norms = torch.cat([metric.whiten(part).norm(dim=1) for part in atoms.split(8192)])
    sums = SquaredSums(x, metric)
    l0 = torch.zeros(len(x), dtype=torch.long, device=device)
    k_atom = torch.zeros(len(atoms), dtype=torch.long, device=device)
    smallest, largest = torch.full_like(norms, torch.inf), torch.zeros_like(norms)
    for start in parallel.mine(range(0, len(x), batch)):
        rows = x[start : start + batch].to(device)
        codes = dictionary.encode(rows.to(atoms.dtype))
        if codes.shape != (len(rows), len(atoms)):
            raise AtomLensError(f"encode gives codes of shape {tuple(codes.shape)}, expected {(len(rows), len(atoms))}")
        reconstruction = dictionary.decode(codes)
        check_rows(reconstruction, "the reconstruction", metric.width)
        sums.update(start, rows, reconstruction)
        active = codes != 0
        k = active.sum(dim=1)
        l0[start : start + len(rows)] = k
        k_atom = torch.maximum(k_atom, (active * k[:, None]).amax(dim=0))
        size = codes.abs()
        largest = torch.maximum(largest, size.amax(dim=0).double())
        smallest = torch.minimum(smallest, size.masked_fill(~active, torch.inf).amin(dim=0).double())
    l0, k_atom, largest = parallel.summed(l0).cpu(), parallel.largest(k_atom), parallel.largest(largest)
    smallest = -parallel.largest(-smallest)
    alive = k_atom > 0
    return Observation(
        *parallel.summed(sums.rows).cpu(),
        l0=l0,
        k_atom=k_atom.cpu(),
        smallest=(smallest.masked_fill(~alive, 0) * norms).cpu(),
        largest=(largest * norms).cpu(),
        found=stability(atoms.float(), l0, metric, alive),
    )


def measure(
    dictionary: Dictionary, x: Float[Tensor | Rows | np.ndarray, "n d"], metric: AtomicInnerProduct, batch: int = 1024
) -> Figures:
    """R² (Euclidean and AIP), q*, L0, empty codes, dead atoms and coherence of `dictionary` on `x`, see `observe`."""
    return observe(dictionary, x, metric, batch).figures
