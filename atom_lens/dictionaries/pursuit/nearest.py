"""The atom most correlated with a row, exactly, by a product of few bits and a check of what that leaves in question.

A pursuit needs the largest entry of a product per row, and none of the others. Products of 8 bits are several times
faster than of 32, and it is known how far off they may be; what they cannot decide is computed again, in full.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

Precision = Literal["full", "bfloat16", "int8"]

# Products of 8 bits have no public name in torch; where it lacks this one, other precisions do the same.
_int_mm = getattr(torch, "_int_mm", None)

_SPREAD = 64  # columns that are mixed before they share a scale of 8 bits; a power of two
_TILE = 64  # atoms of which only the largest correlation is looked at first
_AT_ONCE = 1 << 14  # pairs of a row and an atom whose correlation is computed at once


class Found(NamedTuple):
    """Of each row, the atom most correlated with it, and <row, atom>; atom -1 where none may be chosen."""

    atom: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


def fastest(device: torch.device) -> Precision:
    """The precision in which products are fastest, by what a device can do: timings are in benchmarks/pursuit.py."""
    if device.type == "cuda":
        return "bfloat16"
    # Without instructions for it (VNNI), a CPU multiplies 8 bits one by one.
    able = getattr(torch.cpu, "_is_vnni_supported", None)
    return "int8" if device.type == "cpu" and _int_mm is not None and able is not None and able() else "full"


class Nearest:
    """Finds the largest correlations of rows with unit atoms: made once per dictionary, then called with rows.

    With r = r^ + dr and d = d^ + dd, of which r^ and d^ have few bits, |<r, d> - <r^, d^>| <= |dr| |d| + |r^| |dd|
    (Cauchy-Schwarz); |dr| and |dd| are computed, so the bound holds whatever the rows are. An atom comes into question
    when its correlation may, within that bound, be as large as the exact one of the atom that looks best. All that come
    into question are computed in the precision of the rows, so the choice is that of a full product but for its own
    rounding. Among equals the atom of the smallest index is chosen.

    For 8 bits, columns are mixed by an orthogonal transform first (Hadamard, among 64 columns from all over the width):
    a scale is set by the largest entry of a row, and in an eigenbasis a few entries may be much larger than the rest.

    Args:
        units: atoms of unit norm, shape (F, d), float32 or float64.
        precision: of the product; None for what is fastest on the device.
    """

    def __init__(self, units: Float[Tensor, "F d"], precision: Precision | None = None) -> None:
        self.units = units
        self.precision: Precision = fastest(units.device) if precision is None else precision
        if self.precision == "int8" and _int_mm is None:
            raise ValueError(
                "precision is 'int8', for which this torch has no product: allowed is 'bfloat16'"
            )
        self._off = 0.0  # largest |dd|
        width = units.shape[1]
        self._tiles = -(-len(units) // _TILE)
        if self.precision == "bfloat16":
            self._low = pad(units, (0, 0, 0, _TILE * self._tiles - len(units))).bfloat16()
            # Sums and the results are rounded as well, on a GPU to 8 bits.
            self._off = 2**-8 + 2**-8 + 2**-23 * width + (2**-7 if units.is_cuda else 0)
        elif self.precision == "int8":
            self._blocks = -(-width // _SPREAD)
            self._mix = _hadamard(_SPREAD, units.device)
            self._low = torch.zeros(_TILE * self._tiles, _SPREAD * self._blocks, dtype=torch.int8, device=units.device)
            self._scale = torch.zeros(len(self._low), device=units.device)
            for start in range(0, len(units), 1024):  # by parts that stay in a cache: three times faster
                some = slice(start, min(start + 1024, len(units)))
                self._low[some], self._scale[some], off = self._eight_bits(units[some])
                self._off = max(self._off, float(off.max()))

    def _eight_bits(self, x: Float[Tensor, "m d"]) -> tuple[Tensor, Float[Tensor, " m"], Float[Tensor, " m"]]:
        """Rows in 8 bits, shape (m, wide), their scales, and the norms of what that leaves out."""
        wide = pad(x.float(), (0, _SPREAD * self._blocks - x.shape[1]))
        mixed = (wide.view(-1, _SPREAD, self._blocks).transpose(1, 2).reshape(-1, _SPREAD) @ self._mix).view_as(wide)
        scale = (mixed.abs().amax(dim=1) / 127).clamp_(min=1e-30)
        low = (mixed / scale[:, None]).round_()
        # The mixing is in float32: 2⁻²⁰ is far above its rounding, for rows of norm 1.
        off = mixed.sub_(low * scale[:, None]).norm(dim=1) + 2**-20
        return low.to(torch.int8), scale, off

    def _approximate(self, x: Float[Tensor, "m d"]) -> tuple[Tensor, Float[Tensor, " m"], Float[Tensor, " m"]]:
        """For rows of norm 1: a product (m, tiles * 64), the unit of it per row, and how far it may be off in that."""
        if self.precision == "int8" and _int_mm is not None:
            low, scale, off = self._eight_bits(x)
            product = _int_mm(low, self._low.T).float().mul_(self._scale)
            return product, scale, (off + (1 + off) * self._off) / scale
        low = x.bfloat16()
        off = (x - low).norm(dim=1).float()
        return low @ self._low.T, torch.ones_like(off), off + (1 + off) * self._off

    def __call__(
        self,
        rows: Float[Tensor, "m d"],
        barred: Int[Tensor, "m k"],
        least: Float[Tensor, " m"],
        tau: Float[Tensor, " F"] | None = None,
        signed: bool = False,
    ) -> Found:
        """The atom of the largest correlation, of those that are not barred and reach what they have to.

        Args:
            rows: shape (m, d), finite.
            barred: atoms that each row may not choose, shape (m, k); one may be there several times.
            least: what a correlation has to be at least, for each row; above zero.
            tau: the same for each atom; None where there is no such thing.
            signed: go by the magnitude of correlations.
        """
        if self.precision == "full" or not len(rows):
            return self._in_full(rows, barred, least, tau, signed)
        norm = rows.norm(dim=1)
        product, unit, off = self._approximate(rows / norm.clamp(min=torch.finfo(rows.dtype).tiny)[:, None])
        per = (unit * norm).clamp(min=torch.finfo(rows.dtype).tiny)
        if signed:
            product.abs_()
        if tau is not None:
            product.masked_fill_(product < tau / per[:, None] - off[:, None], -torch.inf)
        product[:, len(self.units) :] = -torch.inf
        product.scatter_(1, barred, -torch.inf)
        tiles = product.view(len(rows), _TILE, self._tiles)
        tops = tiles.amax(dim=1)
        best, tile = tops.max(dim=1)

        atom = torch.full_like(tile, -1)
        value = torch.zeros_like(norm)
        # No correlation is above the norm of its row: rows of which nothing is left are out.
        open_ = ((best + off >= least / per) & (norm >= least)).nonzero()[:, 0]
        if not len(open_):
            return Found(atom, value)
        lead = tiles[open_, :, tile[open_]].argmax(dim=1) * self._tiles + tile[open_]
        bound = self._exact(rows, open_, lead)
        bound = bound.abs() if signed else bound
        reached = least[open_] if tau is None else torch.maximum(least[open_], tau[lead])
        bound = torch.where(bound >= reached, bound, least[open_]) / per[open_] - off[open_]

        of, tile = (tops[open_] >= bound[:, None]).nonzero(as_tuple=True)
        which, within = (tiles[open_[of], :, tile] >= bound[of, None]).nonzero(as_tuple=True)
        of, candidate = of[which], within * self._tiles + tile[which]
        exact = self._exact(rows, open_[of], candidate)
        strength = exact.abs() if signed else exact
        reached = least[open_[of]] if tau is None else torch.maximum(least[open_[of]], tau[candidate])
        strength = strength.masked_fill(strength < reached, -torch.inf)
        top = strength.new_full((len(open_),), -torch.inf).scatter_reduce_(0, of, strength, "amax")
        winner = (strength == top[of]) & (strength > -torch.inf)
        of, candidate, exact = of[winner], candidate[winner], exact[winner]
        none = len(self.units)
        first = candidate.new_full((len(open_),), none).scatter_reduce_(0, of, candidate, "amin")
        winner = candidate == first[of]
        atom[open_] = first.masked_fill(first == none, -1)
        value[open_[of[winner]]] = exact[winner]
        return Found(atom, value)

    def _in_full(
        self,
        rows: Float[Tensor, "m d"],
        barred: Int[Tensor, "m k"],
        least: Float[Tensor, " m"],
        tau: Float[Tensor, " F"] | None,
        signed: bool,
    ) -> Found:
        product = rows @ self.units.T
        strength = product.abs() if signed else product.clone() if barred.shape[1] or tau is not None else product
        if tau is not None:
            strength.masked_fill_(strength < tau, -torch.inf)
        atom = strength.scatter_(1, barred, -torch.inf).argmax(dim=1, keepdim=True)
        value = product.gather(1, atom)[:, 0]
        reached = strength.gather(1, atom)[:, 0] >= least
        return Found(torch.where(reached, atom[:, 0], -1), torch.where(reached, value, 0))

    def _exact(self, rows: Float[Tensor, "m d"], of: Int[Tensor, " p"], atom: Int[Tensor, " p"]) -> Float[Tensor, " p"]:
        """<rows[of], units[atom]>; `of` ascends."""
        if rows.device.type == "cpu":  # without copies of rows and atoms: ten times faster
            starts = torch.searchsorted(of, torch.arange(len(rows) + 1))
            size = (len(rows), len(self.units))
            pattern = torch.sparse_csr_tensor(starts, atom, rows.new_zeros(len(of)), size, check_invariants=False)
            return torch.sparse.sampled_addmm(pattern, rows, self.units.T, beta=0.0).values()
        parts = zip(of.split(_AT_ONCE), atom.split(_AT_ONCE), strict=True)
        return torch.cat([(rows[one] * self.units[two]).sum(dim=1) for one, two in parts])


def _hadamard(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """Sylvester's Hadamard matrix, orthogonal; `size` is a power of two."""
    found = torch.ones(1, 1, device=device)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], dim=1), torch.cat([found, -found], dim=1)]) / 2**0.5
    return found
