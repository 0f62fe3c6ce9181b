"""Threshold-activated orthogonal matching pursuit, batched: the codes of rows over given atoms.

Orthogonal matching pursuit: Pati, Rezaiifar and Krishnaprasad 1993. The inverse of the Gram matrix of the chosen atoms
is updated by the block-inverse formula as atoms join and leave (Rubinstein, Zibulevsky and Elad 2008 do so with
Cholesky factors). Non-negative coefficients: the inner loop of Lawson and Hanson 1974, chapter 23.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from atom_lens.dictionaries.pursuit.nearest import Found, Nearest, Precision
from atom_lens.errors import AtomLensError

_AT_ONCE = {"cpu": 2_621_440}  # entries of a product at a time: what fits in a cache
_AT_ONCE_ELSEWHERE = 1 << 28
_WORTH = 512  # searches from which on it pays to turn the atoms into few bits
# Share of an atom outside the span of the chosen ones: below the first it counts as a combination of them, below the
# second float32 has too few digits to tell.
_DEPENDENT = {torch.float32: 1e-5, torch.float64: 1e-8}
_DOUBTFUL = 0.05


@dataclass(frozen=True)
class Codes:
    """Sparse codes: `count[i]` atoms of row i and their coefficients, then atom 0 with coefficient 0 to fill the row.

    Atoms stand in the order in which they joined, except that one which joins after another left takes its place.
    """

    support: Int[Tensor, "n most"]
    values: Float[Tensor, "n most"]
    count: Int[Tensor, " n"]

    def dense(self, n_atoms: int) -> Float[Tensor, "n F"]:
        """The same codes, with a column for every atom."""
        found = self.values.new_zeros(len(self.values), n_atoms)
        return found.scatter_add_(1, self.support, self.values)


@torch.no_grad()
def pursue(
    y: Float[Tensor, "n d"],
    units: Float[Tensor, "F d"],
    *,
    most: int,
    tau: float | Float[Tensor, " F"] = 0.0,
    signed: bool = False,
    nonnegative: bool = True,
    prune: bool = False,
    search: Nearest | Precision | None = None,
) -> Codes:
    """Codes of the rows of `y`: atoms join one at a time while they correlate with the residual.

    Up to `most` times, among the atoms i that are not chosen and whose correlation <r, d_i> with the residual r is at
    least tau_i, the one with the largest correlation joins; then all coefficients are refitted by least squares, and
    r = y - sum_i z_i d_i. A row stops when no atom qualifies, when its largest correlation is zero up to rounding
    (16 eps |y|), or when the atom found is, up to rounding, a combination of those chosen (a copy, for example).

    The norm is Euclidean: for another one, the caller transforms `y` and the atoms. Nothing here is differentiated:
    coefficients minimise the loss on their support, so by the envelope theorem the gradient of the loss with respect
    to atoms is the one at fixed codes, wherever the support does not change.

    Args:
        y: rows, shape (n, d), float32 or float64.
        units: atoms, shape (F, d), of the same type and of norm 1.
        most: largest number of atoms per row and of rounds, at least 1; more than d or F is allowed and never reached.
        tau: smallest correlation with which an atom joins, in units of `y`: one for all, or one per atom, shape (F,).
        signed: choose by the magnitude of the correlation; needs `nonnegative=False`.
        nonnegative: where the fit would make coefficients negative, coefficients move towards it until the first of
            them is zero; that atom leaves and the rest are refitted, until none is negative (Lawson and Hanson). The
            result is the non-negative least-squares fit over the atoms that stay, with a smaller error than before the
            last one joined. An atom that left may join again in a later round.
        prune: at the end, remove atoms, one at a time, whose removal raises the squared error of the refitted rest by
            less than tau_i², starting with the smallest rise relative to tau_i². The reason: an atom that joins with
            correlation c >= tau_i lowers the squared error by c² / s, where s <= 1 is the squared norm of its part
            outside the span of those chosen; so each atom that joins lowers |r|² + sum_i tau_i², and this rule lowers
            the same sum further.
        search: how the largest correlations are found, None for the fastest: this changes the speed, and codes only by
            rounding. A `Nearest` made once saves turning the same atoms into few bits again.

    Returns:
        Codes, values in the type of `y`.

    Raises:
        AtomLensError: shapes or types that do not fit, no atoms, atoms whose norm is not 1, `most` below 1, `tau`
            negative or NaN, rows that are not finite, `signed` with `nonnegative`, or a `Nearest` of other atoms.
    """
    _check(y, units, most, tau, signed, nonnegative)
    nearest = _searched(y, units, most, search)
    parts = [_pursue(some, nearest, most, tau, signed, nonnegative, prune) for some in _split(y, units)]
    return Codes(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Codes)))


@dataclass(frozen=True)
class Lengths:
    """The lengths of codes at every threshold shared by all atoms, which decides only where a row stops.

    Attributes:
        correlation: smallest correlation with which an atom joined up to each round, shape (n, most); 0 after the last.
        count: number of atoms after that round.
    """

    correlation: Float[Tensor, "n most"]
    count: Int[Tensor, "n most"]

    def at(self, tau: float) -> Int[Tensor, " n"]:
        """The number of atoms of each row."""
        rounds = (self.correlation >= tau).logical_and(self.correlation > 0).sum(dim=1)
        return self.count.gather(1, (rounds - 1).clamp(min=0)[:, None])[:, 0].where(rounds > 0, 0)


@torch.no_grad()
def lengths(
    y: Float[Tensor, "n d"], units: Float[Tensor, "F d"], *, most: int, search: Nearest | Precision | None = None
) -> Lengths:
    """The lengths of the non-negative codes that `pursue` finds without pruning, at all thresholds, from one pursuit.

    Arguments and errors are those of `pursue`.
    """
    _check(y, units, most, 0.0, False, True)
    nearest = _searched(y, units, most, search)
    found = []
    for some in _split(y, units):
        one = Lengths(some.new_zeros(len(some), most), some.new_zeros(len(some), most, dtype=torch.long))
        _pursue(some, nearest, most, 0.0, False, True, False, one)
        found.append(one)
    correlation, count = (torch.cat([getattr(one, name.name) for one in found]) for name in fields(Lengths))
    return Lengths(correlation.cummin(dim=1).values, count)


def _searched(y: Tensor, units: Tensor, most: int, search: Nearest | Precision | None) -> Nearest:
    if isinstance(search, Nearest):
        if search.units is not units:
            raise AtomLensError("search was made for other atoms than units, allowed is Nearest(units)")
        return search
    return Nearest(units, "full" if search is None and len(y) * most < _WORTH else search)


def _split(y: Float[Tensor, "n d"], units: Float[Tensor, "F d"]) -> tuple[Float[Tensor, "m d"], ...]:
    return y.split(max(1, _AT_ONCE.get(y.device.type, _AT_ONCE_ELSEWHERE) // len(units)))


def _check(y: Tensor, units: Tensor, most: int, tau: float | Tensor, signed: bool, nonnegative: bool) -> None:
    if y.dtype not in (torch.float32, torch.float64) or units.dtype != y.dtype:
        raise AtomLensError(f"y is {y.dtype} and units are {units.dtype}, allowed is float32 or float64 for both")
    if not len(units) or units.shape[1] != y.shape[1]:
        raise AtomLensError(f"units have shape {tuple(units.shape)}, allowed is (F, {y.shape[1]}) with F at least 1")
    if most < 1:
        raise AtomLensError(f"most is {most}, allowed is at least 1")
    if isinstance(tau, Tensor) and tau.shape != (len(units),):
        raise AtomLensError(f"tau has shape {tuple(tau.shape)}, allowed is a number or shape ({len(units)},)")
    if not bool((torch.as_tensor(tau) >= 0).all()):
        raise AtomLensError("tau is negative or NaN, allowed are numbers of at least 0")
    if signed and nonnegative:
        raise AtomLensError("signed is True with nonnegative True, allowed is signed with nonnegative=False")
    if len(y) and not bool(torch.isfinite(y).all()):
        raise AtomLensError("y has rows with NaN or infinite values")


@dataclass
class _Fits:
    """Least-squares fits of rows over atoms in slots; everything is zero in slots that are not taken.

    `inverse` is that of the Gram matrix of the atoms taken, and all a pursuit needs: adding or removing an atom changes
    it by rank one, and removing atom j raises the squared error by values[j]² / inverse[j, j].
    """

    inverse: Float[Tensor, "m most most"]
    values: Float[Tensor, "m most"]
    taken: Bool[Tensor, "m most"]

    def take(self, which: Tensor) -> _Fits:
        return _Fits(self.inverse[which], self.values[which], self.taken[which])

    def put(self, which: Tensor, other: _Fits) -> None:
        self.inverse[which], self.values[which], self.taken[which] = other.inverse, other.values, other.taken

    def drop(self, slot: Int[Tensor, " m"]) -> None:
        """Remove one atom of each row and refit the others."""
        rows = torch.arange(len(slot), device=slot.device)
        column = self.inverse[rows, :, slot]
        own = column[rows, slot].clone()
        self.values -= column * (self.values[rows, slot] / own)[:, None]
        self.inverse -= column[:, :, None] * (column / own[:, None])[:, None]
        self.values[rows, slot] = 0
        self.inverse[rows, slot] = 0
        self.inverse[rows, :, slot] = 0
        self.taken[rows, slot] = False

    def make_nonnegative(self, feasible: Float[Tensor, "m most"]) -> None:
        """Lawson and Hanson's inner loop, from `feasible` coefficients: non-negative, and zero in free slots."""
        feasible = feasible.clone()
        while len(rows := (self.values < 0).any(dim=1).nonzero()[:, 0]):
            fits, start = self.take(rows), feasible[rows]
            steps = torch.where(fits.values < 0, start / (start - fits.values), torch.inf)
            step, slot = steps.min(dim=1)
            start += step[:, None] * (fits.values - start)
            start.clamp_(min=0).scatter_(1, slot[:, None], 0)
            fits.drop(slot)
            feasible[rows] = start
            self.put(rows, fits)

    def prune(self, cost: Float[Tensor, "m most"], nonnegative: bool) -> None:
        """Remove atoms while removing one raises the squared error by less than its cost."""
        while True:
            own = self.inverse.diagonal(dim1=1, dim2=2)
            gain = torch.where(self.taken, self.values.square() / own - cost, torch.inf)
            least, slot = gain.min(dim=1)
            rows = (least < 0).nonzero()[:, 0]
            if not len(rows):
                return
            fits, slot = self.take(rows), slot[rows]
            before = fits.values.scatter(1, slot[:, None], 0)
            fits.drop(slot)
            if nonnegative:
                fits.make_nonnegative(before)
            self.put(rows, fits)


@dataclass
class _Rows:
    """The rows whose pursuit still goes on."""

    where: Int[Tensor, " m"]
    y: Float[Tensor, "m d"]
    left: Float[Tensor, "m d"]
    least: Float[Tensor, " m"]
    atoms: Float[Tensor, "m most d"]
    support: Int[Tensor, "m most"]
    fits: _Fits

    def take(self, which: Tensor) -> _Rows:
        """Some of the rows; `which` holds indices."""
        kept = {one.name: getattr(self, one.name).index_select(0, which) for one in fields(self) if one.name != "fits"}
        return _Rows(**kept, fits=self.fits.take(which))

    def joining(self, new: Float[Tensor, "m d"], before: int) -> tuple[Float[Tensor, "m most"], Float[Tensor, " m"]]:
        """The part of new atoms outside the span of those chosen: its coefficients over them, and its squared norm.

        Where little lies outside, both are differences of nearly equal numbers and computed in float64.
        """
        most = self.support.shape[1]

        def outside(fits: _Fits, gram: Tensor, own: Tensor | float) -> tuple[Tensor, Tensor]:
            weights = (fits.inverse[:, :before, :before] * gram[:, None]).sum(dim=2)
            return weights, own - (weights * gram).sum(dim=1)

        # Transposed, because the other order is slow on a CPU.
        gram = torch.bmm(new[:, None], self.atoms[:, :before].transpose(1, 2))[:, 0].double()
        weights, square = outside(self.fits, gram, 1.0)
        doubtful = (square < _DOUBTFUL).nonzero()[:, 0] if new.dtype == torch.float32 else square.new_zeros(0).long()
        if len(doubtful):
            wide = new[doubtful].double()
            gram = torch.bmm(self.atoms[doubtful, :before].double(), wide[:, :, None])[:, :, 0]
            weights[doubtful], square[doubtful] = outside(self.fits.take(doubtful), gram, wide.square().sum(dim=1))
        return pad(-weights, (0, most - before)), square

    def join(
        self,
        atom: Int[Tensor, " m"],
        new: Float[Tensor, "m d"],
        correlation: Float[Tensor, " m"],
        direction: Float[Tensor, "m most"],
        square: Float[Tensor, " m"],
        nonnegative: bool,
    ) -> None:
        """Add an atom to each row, in its first free slot, and refit."""
        rows = torch.arange(len(atom), device=atom.device)
        slot = self.fits.taken.int().argmin(dim=1)
        feasible = self.fits.values
        direction[rows, slot] = 1
        self.fits.inverse += direction[:, :, None] * (direction / square[:, None])[:, None]
        self.fits.values = feasible + direction * (correlation / square)[:, None]
        self.fits.taken[rows, slot] = True
        self.support[rows, slot] = atom
        self.atoms[rows, slot] = new
        if nonnegative:
            self.fits.make_nonnegative(feasible)

    def refresh(self, before: int) -> None:
        values = self.fits.values[:, None, :before].to(self.y)
        self.left = self.y - torch.bmm(values, self.atoms[:, :before])[:, 0]


def _pursue(
    y: Float[Tensor, "n d"],
    nearest: Nearest,
    most: int,
    tau: float | Tensor,
    signed: bool,
    nonnegative: bool,
    prune: bool,
    told: Lengths | None = None,
) -> Codes:
    """`pursue` for some of the rows; `told` is filled with the correlation and the number of atoms of every round."""
    n, d = y.shape
    info = torch.finfo(y.dtype)
    least = (16 * info.eps * y.norm(dim=1)).clamp(min=info.tiny)
    per_atom = tau.to(y) if isinstance(tau, Tensor) else None
    if not isinstance(tau, Tensor):
        least = least.clamp(min=tau)
    support = torch.zeros(n, most, dtype=torch.long, device=y.device)
    wide = y.new_zeros(n, most, most, dtype=torch.double)
    fits = _Fits(wide, wide[:, 0].clone(), support.bool())
    every = torch.arange(n, device=y.device)
    rows = _Rows(every, y, y, least, y.new_zeros(n, most, d), support.clone(), fits.take(every))
    for before in range(most):
        taken = rows.fits.taken[:, :before]
        # A free slot bars the row's first atom once more.
        first = rows.support.gather(1, rows.fits.taken.int().argmax(dim=1, keepdim=True))
        barred = torch.where(taken, rows.support[:, :before], first)
        found = nearest(rows.left, barred, rows.least, per_atom, signed)
        on = (found.atom >= 0).nonzero()[:, 0]
        if len(on) < len(found.atom):
            rows, found = rows.take(on), Found(found.atom[on], found.value[on])
        new = nearest.units.index_select(0, found.atom)
        direction, square = rows.joining(new, before)
        on = (square > _DEPENDENT[y.dtype]).nonzero()[:, 0]
        if len(on) < len(square):
            rows, found = rows.take(on), Found(found.atom[on], found.value[on])
            new, direction, square = new[on], direction[on], square[on]
        if not len(on):
            break
        rows.join(found.atom, new, found.value, direction, square, nonnegative)
        fits.put(rows.where, rows.fits)
        support[rows.where] = rows.support
        if told is not None:
            told.correlation[rows.where, before] = found.value
            told.count[rows.where, before] = rows.fits.taken.sum(dim=1)
        if before + 1 < most:
            rows.refresh(before + 1)
    if prune:
        cost = torch.as_tensor(tau, dtype=torch.double, device=y.device).square().expand(len(nearest.units))
        fits.prune(cost[support], nonnegative)
    count = fits.taken.sum(dim=1)
    order = (~fits.taken).to(torch.int8).argsort(dim=1, stable=True)
    beyond = torch.arange(most, device=y.device) >= count[:, None]
    support, values = (found.gather(1, order).masked_fill(beyond, 0) for found in (support, fits.values.to(y)))
    return Codes(support, values, count)
