"""Edits of codes: what becomes of which atoms, at which positions, for which items of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# None: every position, also those that generation adds. Columns of the prompt, negative ones from its end. Or a mask
# of shape (batch, pos).
Positions = int | Sequence[int] | Tensor | None
# One number; one per chosen atom, (k,); or one per item of the batch and chosen atom, (batch, k).
Value = float | int | Tensor


@dataclass(frozen=True)
class Place:
    """Where an edit acts.

    Attributes:
        positions: None, columns of the token batch (padding counts, as everywhere in TransformerLens), or a mask of
            shape (batch, pos). Columns and masks are of the prompt; tokens that generation adds are edited under None
            only.
        items: indices of the batch; None for all.
    """

    positions: Positions = None
    items: Sequence[int] | None = None

    def mask(self, batch: int, length: int, past: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """The places within one forward pass of `length` columns that stand after `past` cached ones.

        Raises:
            ValueError: a position outside the prompt, an item outside the batch, a mask of another shape.
        """
        total = past + length
        generating = past > 0 and length == 1
        if self.positions is None:
            columns = torch.ones(batch, length, dtype=torch.bool, device=device)
        elif generating:
            columns = torch.zeros(batch, length, dtype=torch.bool, device=device)
        elif isinstance(self.positions, Tensor) and self.positions.ndim == 2:
            if tuple(self.positions.shape) != (batch, total):
                raise ValueError(
                    f"positions is a mask of shape {tuple(self.positions.shape)}, the prompt has {(batch, total)}"
                )
            columns = self.positions[:, past:].to(device, torch.bool)
        else:
            wanted = [self.positions] if isinstance(self.positions, int) else [int(p) for p in self.positions]
            for position in wanted:
                if not -total <= position < total:
                    raise ValueError(
                        f"position {position} is outside the prompt, allowed are {-total} to {total - 1} "
                        f"({total} tokens with padding)"
                    )
            columns = torch.zeros(batch, total, dtype=torch.bool, device=device)
            columns[:, wanted] = True
            columns = columns[:, past:]
        if self.items is None:
            return columns
        for item in self.items:
            if not 0 <= item < batch:
                raise ValueError(f"item {item} is outside the batch, allowed are 0 to {batch - 1}")
        rows = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        rows[list(self.items)] = True
        return columns & rows


@dataclass(frozen=True)
class Edit:
    """One change of codes.

    Attributes:
        change: (codes of the chosen atoms, item of the batch that each row belongs to) -> codes.
        atoms: indices of the chosen atoms; None for all.
        place: where it acts.
        others: the chosen atoms are all but `atoms`.
    """

    change: Callable[[Float[Tensor, "rows k"], Int[Tensor, " rows"]], Float[Tensor, "rows k"]]
    atoms: tuple[int, ...] | None
    place: Place
    others: bool = False

    def __call__(self, codes: Float[Tensor, "rows F"], items: Int[Tensor, " rows"]) -> Float[Tensor, "rows F"]:
        """The codes after this edit."""
        if self.atoms is None:
            return self.change(codes, items)
        index = torch.tensor(self.atoms, device=codes.device)
        if self.others:
            rest = torch.ones(codes.shape[1], dtype=torch.bool, device=codes.device).index_fill(0, index, False)
            index = rest.nonzero()[:, 0]
        return codes.index_copy(1, index, self.change(codes[:, index], items))


def _chosen(atoms: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if atoms is None:
        return None
    chosen = (atoms,) if isinstance(atoms, int) else tuple(int(atom) for atom in atoms)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"atoms is {list(chosen)}, expected at least one index and each only once")
    return chosen


def rows_of(value: Value, like: Float[Tensor, "rows k"], items: Int[Tensor, " rows"]) -> Float[Tensor, "*rows k"]:
    """`value` for every row of `like`."""
    if not isinstance(value, Tensor):
        return torch.full_like(like[:1], value)
    value = value.to(like)
    if value.ndim == 2 and items.numel() and int(items.max()) >= len(value):
        raise ValueError(f"a value has {len(value)} rows, the batch has an item {int(items.max())}")
    if value.ndim not in (1, 2) or value.shape[-1] != like.shape[1]:
        raise ValueError(
            f"a value has shape {tuple(value.shape)}, allowed are a number, ({like.shape[1]},) for the chosen atoms, "
            f"or (batch, {like.shape[1]})"
        )
    return value[items] if value.ndim == 2 else value[None]


def assign(
    atoms: int | Sequence[int] | None, value: Value, positions: Positions = None, items: Sequence[int] | None = None
) -> Edit:
    """z' = value."""
    return Edit(lambda z, of: rows_of(value, z, of).expand_as(z), _chosen(atoms), Place(positions, items))


def ablate(
    atoms: int | Sequence[int] | None = None, positions: Positions = None, items: Sequence[int] | None = None
) -> Edit:
    """z' = 0."""
    return assign(atoms, 0.0, positions, items)


def scale(
    atoms: int | Sequence[int] | None, factor: Value, positions: Positions = None, items: Sequence[int] | None = None
) -> Edit:
    """z' = factor z."""
    return Edit(lambda z, of: z * rows_of(factor, z, of), _chosen(atoms), Place(positions, items))


def add(
    atoms: int | Sequence[int] | None, amount: Value, positions: Positions = None, items: Sequence[int] | None = None
) -> Edit:
    """z' = z + amount, whether the atom fires or not: steering along it. In units of the code."""
    return Edit(lambda z, of: z + rows_of(amount, z, of), _chosen(atoms), Place(positions, items))


def keep_only(atoms: int | Sequence[int], positions: Positions = None, items: Sequence[int] | None = None) -> Edit:
    """z' = z on `atoms`, 0 on all others."""
    return Edit(lambda z, of: torch.zeros_like(z), _chosen(atoms), Place(positions, items), others=True)


def swap(
    codes: Float[Tensor, " F"] | Float[Tensor, "batch F"],
    positions: Positions = None,
    items: Sequence[int] | None = None,
) -> Edit:
    """z' = codes: the whole code of another subject."""
    return assign(None, codes, positions, items)


def exchange(
    old: Float[Tensor, " F"] | Float[Tensor, "batch F"],
    new: Float[Tensor, " F"] | Float[Tensor, "batch F"],
    positions: Positions = None,
    items: Sequence[int] | None = None,
) -> Edit:
    """z' = z - min(z, old) + s new, with s = sum(min(z, old)) / sum(old): as much of `new` as there was of `old`.

    Where the code is `old` it becomes `new`; where no atom of `old` fires nothing happens. So it needs no position.
    """

    def change(z: Float[Tensor, "rows F"], items: Int[Tensor, " rows"]) -> Float[Tensor, "rows F"]:
        was = rows_of(old, z, items)
        there = torch.minimum(z, was)
        share = there.sum(dim=1, keepdim=True) / was.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return z - there + share * rows_of(new, z, items)

    return Edit(change, None, Place(positions, items))
