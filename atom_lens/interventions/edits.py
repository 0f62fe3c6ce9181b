"""Edits of codes: how which atoms change, at which positions, for which items of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.tensors.checks import Which, choice, indices

# None: every position, also those that generation adds. Or columns of the prompt, negative ones from its end. Or a
# mask of shape (pos,) or (batch, pos).
Positions = Which | None
# One number; or one per chosen atom, (k,); or one per item of the batch and chosen atom, (batch, k).
Value = SupportsFloat | np.ndarray | Tensor


@dataclass(frozen=True)
class Place:
    """Where an edit acts.

    Attributes:
        positions: None, columns of the token batch (padding counts, as everywhere in TransformerLens), or a mask of
            shape (pos,) or (batch, pos). Columns and masks are of the prompt; only None also edits tokens that
            generation adds.
        items: indices or a mask of the batch; None for all.

    Raises:
        AtomLensError: neither indices nor a mask.
    """

    positions: Positions = None
    items: Which | None = None

    def __post_init__(self) -> None:
        positions = self.positions
        if isinstance(positions, Tensor | np.ndarray) and positions.ndim == 2:
            table = torch.as_tensor(positions)
            # Attention masks are integers, so 0 and 1 are accepted here.
            if not bool(((table == 0) | (table == 1)).all()):
                raise AtomLensError("positions has two dimensions, a mask (batch, pos) holds booleans, or 0 and 1 only")
            object.__setattr__(self, "positions", table.bool())
        elif positions is not None:
            object.__setattr__(self, "positions", choice(positions, "position"))
        if self.items is not None:
            object.__setattr__(self, "items", choice(self.items, "item"))

    def mask(self, batch: int, length: int, past: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """The places within one forward pass of `length` columns that follow `past` cached ones.

        Raises:
            AtomLensError: a position outside the prompt, an item outside the batch, a mask of another shape.
        """
        total = past + length
        generating = past > 0 and length == 1
        if self.positions is None:
            columns = torch.ones(batch, length, dtype=torch.bool, device=device)
        elif generating:
            columns = torch.zeros(batch, length, dtype=torch.bool, device=device)
        elif isinstance(self.positions, Tensor):
            if tuple(self.positions.shape) != (batch, total):
                raise AtomLensError(
                    f"positions is a mask of shape {tuple(self.positions.shape)}, the prompt has {(batch, total)}"
                )
            columns = self.positions[:, past:].to(device)
        else:
            wanted = indices(self.positions, total, "position", "the prompt with its padding", least=-total)
            columns = torch.zeros(batch, total, dtype=torch.bool, device=device)
            columns[:, wanted.to(device)] = True
            columns = columns[:, past:]
        if self.items is None:
            return columns
        rows = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        rows[indices(self.items, batch, "item", "the batch").to(device)] = True
        return columns & rows


@dataclass(frozen=True)
class Edit:
    """One change of codes.

    Attributes:
        change: (codes of the chosen atoms, item of the batch that each row belongs to) -> codes.
        atoms: indices or a mask of the chosen atoms; None for all.
        place: where it acts.
        others: whether all atoms but `atoms` are chosen.
    """

    change: Callable[[Float[Tensor, "rows k"], Int[Tensor, " rows"]], Float[Tensor, "rows k"]]
    atoms: Which | None
    place: Place
    others: bool = False

    def __call__(self, codes: Float[Tensor, "rows F"], items: Int[Tensor, " rows"]) -> Float[Tensor, "rows F"]:
        """The codes after this edit."""
        if self.atoms is None:
            return self.change(codes, items)
        index = indices(self.atoms, codes.shape[1], "atom", "the dictionary").to(codes.device)
        if self.others:
            rest = torch.ones(codes.shape[1], dtype=torch.bool, device=codes.device).index_fill(0, index, False)
            index = rest.nonzero()[:, 0]
        return codes.index_copy(1, index, self.change(codes[:, index], items))


def _chosen(atoms: Which | None) -> tuple[int, ...] | tuple[bool, ...] | None:
    if atoms is None:
        return None
    chosen = choice(atoms, "atom")
    mask = len(chosen) > 0 and isinstance(chosen[0], bool)
    if not chosen or (not any(chosen) if mask else len(set(chosen)) < len(chosen)):
        raise AtomLensError(f"atoms is {list(chosen)}, expected at least one index and each only once, or a mask")
    return chosen


def rows_of(value: Value, like: Float[Tensor, "rows k"], items: Int[Tensor, " rows"]) -> Float[Tensor, "*rows k"]:
    """`value` for every row of `like`."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.ndim == 0:
        return value.expand(1, like.shape[1])
    if value.ndim == 2 and items.numel() and int(items.max()) >= len(value):
        raise AtomLensError(f"a value has {len(value)} rows, the batch has an item {int(items.max())}")
    if value.ndim not in (1, 2) or value.shape[-1] != like.shape[1]:
        raise AtomLensError(
            f"a value has shape {tuple(value.shape)}, allowed are a number, ({like.shape[1]},) for the chosen atoms, "
            f"or (batch, {like.shape[1]})"
        )
    return value[items] if value.ndim == 2 else value[None]


def assign(atoms: Which | None, value: Value, positions: Positions = None, items: Which | None = None) -> Edit:
    """z' = value."""
    return Edit(lambda z, of: rows_of(value, z, of).expand_as(z), _chosen(atoms), Place(positions, items))


def ablate(atoms: Which | None = None, positions: Positions = None, items: Which | None = None) -> Edit:
    """z' = 0."""
    return assign(atoms, 0.0, positions, items)


def scale(atoms: Which | None, factor: Value, positions: Positions = None, items: Which | None = None) -> Edit:
    """z' = factor z."""
    return Edit(lambda z, of: z * rows_of(factor, z, of), _chosen(atoms), Place(positions, items))


def add(atoms: Which | None, amount: Value, positions: Positions = None, items: Which | None = None) -> Edit:
    """z' = z + amount, in units of the code, whether the atom fires or not: steering along it."""
    return Edit(lambda z, of: z + rows_of(amount, z, of), _chosen(atoms), Place(positions, items))


def keep_only(atoms: Which, positions: Positions = None, items: Which | None = None) -> Edit:
    """z' = z on `atoms`, 0 on all others."""
    return Edit(lambda z, of: torch.zeros_like(z), _chosen(atoms), Place(positions, items), others=True)


def swap(
    codes: Float[Tensor | np.ndarray, " F"] | Float[Tensor | np.ndarray, "batch F"],
    positions: Positions = None,
    items: Which | None = None,
) -> Edit:
    """z' = codes: the whole code of another subject."""
    return assign(None, codes, positions, items)


def exchange(
    old: Float[Tensor | np.ndarray, " F"] | Float[Tensor | np.ndarray, "batch F"],
    new: Float[Tensor | np.ndarray, " F"] | Float[Tensor | np.ndarray, "batch F"],
    positions: Positions = None,
    items: Which | None = None,
) -> Edit:
    """z' = z - min(z, old) + s new, with s = sum(min(z, old)) / sum(old): as much of `new` as there was of `old`.

    Where the code is `old` it becomes `new`; where no atom of `old` fires nothing happens, so no position is needed.
    """

    def change(z: Float[Tensor, "rows F"], items: Int[Tensor, " rows"]) -> Float[Tensor, "rows F"]:
        was = rows_of(old, z, items)
        there = torch.minimum(z, was)
        share = there.sum(dim=1, keepdim=True) / was.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return z - there + share * rows_of(new, z, items)

    return Edit(change, None, Place(positions, items))
