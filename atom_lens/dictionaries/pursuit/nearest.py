"""The atom most correlated with a row, exactly: a low-precision product, then an exact check of the close candidates.

A pursuit needs only the largest entry of a product per row. Products in 8 bits are several times faster than in 32,
and their error is bounded; what they cannot decide is computed again in full precision.
"""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.nn.functional import pad

from atom_lens.errors import AtomLensError

Precision = Literal["full", "bfloat16", "int8"]

# Products in 8 bits have no public name in torch; where it lacks this one, another precision is used.
_int_mm = getattr(torch, "_int_mm", None)

_SPREAD = 32  # columns that are mixed before they share a scale of 8 bits; a power of two
_TILE = 64  # atoms of which only the largest correlation is looked at first
_AT_ONCE = 1 << 14  # pairs of a row and an atom whose exact correlation is computed at once


class Found(NamedTuple):
    """For each row the atom most correlated with it, and <row, atom>; atom -1 where none may be chosen."""

    atom: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


def fastest(device: torch.device) -> Precision:
    """The precision in which products are fastest on a device; benchmarks/pursuit.py times them."""
    if device.type == "cuda":
        return "bfloat16"
    # Without instructions for 8 bits (VNNI) a CPU multiplies them one by one.
    able = getattr(torch.cpu, "_is_vnni_supported", None)
    return "int8" if device.type == "cpu" and _int_mm is not None and able is not None and able() else "full"


class Nearest:
    """Finds the largest correlations of rows with unit atoms: made once per dictionary, then called with rows.

    With r = r^ + dr and d = d^ + dd, where r^ and d^ have few bits, |<r, d> - <r^, d^>| <= |dr| |d| + |r^| |dd|
    (Cauchy-Schwarz); |dr| and |dd| are computed, so the bound holds for any rows. An atom is a candidate when its
    correlation could, within that bound, be as large as the exact one of the atom that looks best. Correlations of all
    candidates are computed in the precision of the rows, so the choice is that of a full product up to its own
    rounding. Among equals the atom of the smallest index is chosen.

    In 8 bits, columns are first mixed by an orthogonal transform (Hadamard, 32 columns spread over the width): the
    largest entry of a row sets its scale, and in an eigenbasis a few entries may be much larger than the rest.

    Args:
        units: atoms of unit norm, shape (F, d), float32 or float64.
        precision: of the product; None takes what is fastest on the device.

    Raises:
        AtomLensError: an atom whose norm is NaN or more than 0.001 away from 1, or a precision that torch lacks.
    """

    def __init__(self, units: Float[Tensor, "F d"], precision: Precision | None = None) -> None:
        self.units = units
        self.precision: Precision = fastest(units.device) if precision is None else precision
        wrong = ~((units.norm(dim=1) - 1).abs() <= 1e-3)
        if bool(wrong.any()):
            which = int(wrong.nonzero()[0])
            raise AtomLensError(
                f"units has norm {float(units[which].norm()):.4g} in row {which}, allowed are rows of norm 1"
            )
        if self.precision == "int8" and _int_mm is None:
            raise AtomLensError("precision is 'int8', for which this torch has no product: allowed is 'bfloat16'")
        if self.precision == "full":
            return
        n, width = units.shape
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._tiles = -(-n // _TILE)
        # Atoms in the order of the product's columns: tile t has columns t, t + tiles, and so on. Indices from
        # n on repeat the last atom, to fill the last tile.
        self._atom = torch.arange(_TILE * self._tiles, device=units.device)
        self._scale = torch.ones(self._tiles, device=units.device)
        if self.precision == "bfloat16":
            self._atom = rearrange(self._atom, "(tile within) -> (within tile)", within=_TILE)
            self._low = units.bfloat16()[self._atom.clamp(max=n - 1)]
            # Sums and results are rounded too, on a GPU to 8 bits.
            self._off = 2**-8 + 2**-8 + 2**-23 * width + (2**-7 if units.is_cuda else 0)
            return
        filled = torch.cat([units, units[-1:].expand(-n % _TILE, -1)]) if n % _TILE else units
        self._off = 0.0  # largest |dd|
        self._blocks = -(-width // _SPREAD)
        self._mix = _hadamard(_SPREAD, units.device)
        low = torch.empty(_TILE, self._tiles, _SPREAD * self._blocks, dtype=torch.int8, device=units.device)
        for some in torch.arange(self._tiles, device=units.device).split(16):  # parts that fit a cache: 3 times faster
            place = slice(int(some[0]), int(some[-1]) + 1)
            atoms = self._atom[_TILE * place.start : _TILE * place.stop]
            mixed = self._mixed(filled[_TILE * place.start : _TILE * place.stop])
            # Atoms that need similar scales share one.
            tops, order = mixed.abs().amax(dim=1).sort()
            scale = (tops[_TILE - 1 :: _TILE] / 127).clamp_(min=1e-30)
            few, off = _few_bits(mixed.index_select(0, order), scale.repeat_interleave(_TILE))
            low[:, place] = rearrange(few, "(tile within) wide -> within tile wide", within=_TILE)
            atoms.copy_(atoms[order])
            self._scale[place] = scale
            self._off = max(self._off, float(off.max()))
        self._low = low.flatten(0, 1)
        self._atom = rearrange(self._atom, "(tile within) -> (within tile)", within=_TILE)

    def _mixed(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m wide"]:
        missing = _SPREAD * self._blocks - x.shape[1]
        wide = pad(x.float(), (0, missing)) if missing else x.float()
        blocks = wide.unflatten(1, (_SPREAD, self._blocks)).transpose(1, 2).reshape(-1, _SPREAD)
        return (blocks @ self._mix).view(wide.shape)

    def _approximate(self, x: Float[Tensor, "m d"]) -> tuple[Tensor, Float[Tensor, " m"], Float[Tensor, " m"]]:
        """For rows of norm 1: a product (m, 64 * tiles) before scaling by row and tile, the rows' scales, the bound."""
        if self.precision == "int8" and _int_mm is not None:
            mixed = self._mixed(x)
            scale = (mixed.abs().amax(dim=1) / 127).clamp_(min=1e-30)
            low, off = _few_bits(mixed, scale)
            product = _int_mm(low, self._low.T, out=self._memory("product", len(x), torch.int32))
            return product, scale, off + (1 + off) * self._off
        low = x.bfloat16()
        off = (x - low).norm(dim=1).float()
        return low @ self._low.T, torch.ones_like(off), off + (1 + off) * self._off

    def _memory(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """Memory for a product, reused: getting it from the system each time would take a third of the time."""
        key = (name, threading.get_ident())
        kept = self._kept.get(key)
        if kept is None or len(kept) < rows:
            self._kept[key] = kept = torch.empty(rows, len(self._low), dtype=dtype, device=self._low.device)
        return kept[:rows]

    def __call__(
        self,
        rows: Float[Tensor, "m d"],
        barred: Int[Tensor, "m k"],
        least: Float[Tensor, " m"],
        tau: Float[Tensor, " F"] | None = None,
        signed: bool = False,
    ) -> Found:
        """The atom of the largest correlation among those that are not barred and reach their thresholds.

        Args:
            rows: shape (m, d), finite.
            barred: atoms that each row may not choose, shape (m, k); repeats are allowed.
            least: the smallest correlation that each row accepts; above zero.
            tau: the smallest correlation that each atom accepts; None for no such limit.
            signed: choose by the magnitude of correlations.
        """
        if self.precision == "full" or not len(rows):
            return self._in_full(rows, barred, least, tau, signed)
        norm = rows.norm(dim=1)
        product, unit, off = self._approximate(rows / norm.clamp(min=torch.finfo(rows.dtype).tiny)[:, None])
        lowest = least / norm
        if signed:
            product.abs_()
        if tau is not None:
            product = self._memory("real", len(rows), torch.float32).copy_(product)
            columns = self._scale.repeat(_TILE)
            reach = tau[self._atom.clamp(max=len(tau) - 1)] / columns
            reach = reach * (1 / (norm * unit))[:, None] - (off / unit)[:, None] / columns
            product.masked_fill_(product < reach, -torch.inf)
        tiles = product.view(len(rows), _TILE, self._tiles)
        tops = tiles.amax(dim=1) * self._scale * unit[:, None]
        best, tile = tops.max(dim=1)

        atom = torch.full_like(tile, -1)
        value = torch.zeros_like(norm)
        # No correlation exceeds the norm of its row: rows with nothing left are done.
        open_ = ((best + off >= lowest) & (lowest <= 1)).nonzero()[:, 0]
        if not len(open_):
            return Found(atom, value)
        rows, barred, least, norm, off = (one.index_select(0, open_) for one in (rows, barred, least, norm, off))

        def qualified(of: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
            """Exact correlations, and their strength: -inf where an atom is barred or below a threshold."""
            exact = self._exact(rows, of, candidate)
            strength = exact.abs() if signed else exact
            reached = least[of] if tau is None else torch.maximum(least[of], tau[candidate])
            out = (strength < reached) | (barred[of] == candidate[:, None]).any(dim=1)
            return exact, strength.masked_fill(out, -torch.inf)

        tile = tile[open_]
        lead = self._atom[tiles[open_, :, tile].argmax(dim=1) * self._tiles + tile].clamp(max=len(self.units) - 1)
        bound = torch.maximum(qualified(torch.arange(len(rows), device=rows.device), lead)[1], least) / norm - off
        of, tile = (tops.index_select(0, open_) >= bound[:, None]).nonzero(as_tuple=True)
        near = tiles[open_[of], :, tile] >= (bound[of] / (unit[open_[of]] * self._scale[tile]))[:, None]
        which, within = near.nonzero(as_tuple=True)
        of, candidate = of[which], self._atom[within * self._tiles + tile[which]]
        if len(self.units) % _TILE:
            own = candidate < len(self.units)
            of, candidate = of[own], candidate[own]
        exact, strength = qualified(of, candidate)
        top = strength.new_full((len(rows),), -torch.inf).scatter_reduce_(0, of, strength, "amax")
        equal = (strength == top[of]) & (strength > -torch.inf)
        of, candidate, exact = of[equal], candidate[equal], exact[equal]
        none = len(self.units)
        first = candidate.new_full((len(rows),), none).scatter_reduce_(0, of, candidate, "amin")
        atom[open_] = first.masked_fill(first == none, -1)
        chosen = candidate == first[of]
        value[open_[of[chosen]]] = exact[chosen]
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


def _few_bits(x: Float[Tensor, "m wide"], scale: Float[Tensor, " m"]) -> tuple[Int8[Tensor, "m wide"], Tensor]:
    """Rows in 8 bits, and the norms of the rounding errors. `x` is overwritten."""
    low = (x / scale[:, None]).round_()
    # Mixing and scaling are in float32: for rows of norm 1, 2⁻²⁰ is far above their rounding.
    few = low.to(torch.int8)
    return few, x.sub_(low.mul_(scale[:, None])).norm(dim=1) + 2**-20


def _hadamard(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """Sylvester's Hadamard matrix, orthogonal; `size` is a power of two."""
    found = torch.ones(1, 1, device=device)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], dim=1), torch.cat([found, -found], dim=1)]) / 2**0.5
    return found
