"""Checks of what callers pass in: matrices, choices, masks, labels and seeds, each taken for what it is or refused."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from atom_lens.errors import AtomLensError
from atom_lens.tensors.rows import Rows

# Some of n things: an index, indices, or a mask with one boolean for each of the n.
Which = SupportsIndex | Iterable[SupportsIndex]
Mask = Iterable[Any]
Labels = Iterable[Hashable]


def matrix(x: Any, name: str) -> Tensor | Rows:
    """`x` as it is, or the tensor of a numpy array.

    Raises:
        AtomLensError: another type, not two dimensions, or numbers that are not floating-point.
    """
    if not isinstance(x, Tensor | Rows | np.ndarray):
        raise AtomLensError(
            f"{name} is of type {type(x).__name__}, allowed are a tensor and a numpy array (rows, width)"
        )
    if x.ndim != 2:
        raise AtomLensError(f"{name} must have shape (rows, width), got shape {tuple(x.shape)}")
    if not (x.dtype.kind == "f" if isinstance(x, np.ndarray) else x.dtype.is_floating_point):
        raise AtomLensError(f"{name} has numbers of type {x.dtype}, allowed are floating-point numbers")
    if isinstance(x, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about read-only arrays: nothing here writes to them
            return torch.from_numpy(np.ascontiguousarray(x, x.dtype.newbyteorder("=")))
    return x


def _plain(value: Any) -> Any:
    """A numpy scalar, or a tensor or array without dimensions, as a Python value; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and not value.ndim else value


def _flat(which: Any, name: str) -> Int[Tensor, " m"] | Bool[Tensor, " n"]:
    """Indices as int64, or a mask as booleans, on the CPU: this is the only place that tells them apart."""
    which = _plain(which)
    if isinstance(which, Tensor | np.ndarray):
        found = torch.as_tensor(which).detach().cpu()
        if found.ndim != 1:
            raise AtomLensError(
                f"{name} has shape {tuple(found.shape)}, allowed are indices or a mask in one dimension"
            )
        # torch reads uint8 as a mask, numpy as indices.
        if found.dtype == torch.uint8 or found.dtype.is_floating_point or found.dtype.is_complex:
            raise AtomLensError(f"{name} has numbers of type {found.dtype}, allowed are int64 or booleans")
        return found if found.dtype == torch.bool else found.long()
    several = isinstance(which, Iterable) and not isinstance(which, str)
    values = [_plain(value) for value in which] if several else [which]
    if several and values and all(isinstance(value, bool) for value in values):
        return torch.tensor(values)
    if wrong := [value for value in values if type(value) is not int]:
        raise AtomLensError(f"{name} holds {wrong[0]!r}, allowed are integers, or one boolean for each")
    return torch.tensor(values, dtype=torch.long)


def choice(which: Which, name: str) -> tuple[int, ...] | tuple[bool, ...]:
    """Indices or a mask, kept until the number of things to choose from is known and `indices` can check them."""
    return tuple(_flat(which, name).tolist())


def indices(which: Which, n: int, name: str, of: str, least: int = 0) -> Int[Tensor, " m"]:
    """Which of `n` things are chosen, by indices or by a mask, each at most once.

    Args:
        which: an index, indices, or a mask.
        n: how many there are.
        name: of one of them, for the error.
        of: what they are among, for the error.
        least: the smallest index allowed; -n where indices may count from the end.

    Raises:
        AtomLensError: neither indices nor a mask, an index out of range or chosen twice, or a mask of another length.
    """
    found = _flat(which, name)
    if found.dtype == torch.bool:
        if len(found) != n:
            raise AtomLensError(f"the mask of {name}s has {len(found)} booleans, {of} has {n}")
        return found.nonzero()[:, 0]
    if len(outside := found[(found < least) | (found >= n)]):
        raise AtomLensError(f"{name} {int(outside[0])} is outside {of}, allowed are {least} to {n - 1}")
    found = found % max(n, 1)
    # A mask given as zeros and ones in integers ends here.
    if len(twice := found[found.bincount(minlength=n)[found] > 1]):
        raise AtomLensError(f"{name} {int(twice[0])} is chosen more than once; a mask holds booleans")
    return found


def mask(which: Mask, n: int, name: str) -> Bool[Tensor, " n"]:
    """One boolean for each of `n` things, on the CPU; indices are refused, for 0 and 1 may be either."""
    found = _flat(which, name)
    if found.dtype != torch.bool or len(found) != n:
        kind = "booleans" if found.dtype == torch.bool else "indices"
        raise AtomLensError(f"{name} holds {len(found)} {kind}, expected one boolean for each of {n}")
    return found


def counts(given: Any, name: str) -> Int[Tensor, " n"]:
    """Counts, 0 or more, one per row, on the CPU; a mask is refused."""
    found = _flat(given, name)
    if found.dtype == torch.bool or (len(found) and int(found.min()) < 0):
        raise AtomLensError(f"{name} holds {found.min().item()}, allowed are counts >= 0")
    return found


def labels(given: Labels, n: int | None, name: str) -> list[Any]:
    """A label for each of `n` rows, as plain values, so that equal labels compare equal.

    Raises:
        AtomLensError: no sequence, another length, or a label that cannot be hashed or does not equal itself (NaN).
    """
    if isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) != 1:
        raise AtomLensError(f"{name} is {type(given).__name__} and no sequence of labels, expected one for each row")
    # The elements of a tensor would compare by identity.
    found = given.tolist() if isinstance(given, Tensor | np.ndarray) else [_plain(value) for value in given]
    if n is not None and len(found) != n:
        raise AtomLensError(f"{name} has {len(found)} rows, expected {n}")
    for label in found:
        if not isinstance(label, Hashable) or label != label:
            raise AtomLensError(f"{name} holds {label!r}, which is no label: it does not equal another one like it")
    return found


def checked_seed(given: SupportsIndex) -> int:
    """A seed that the generators of both torch and numpy accept.

    Raises:
        AtomLensError: not an integer from 0 to 2**63 - 1.
    """
    value = _plain(given)
    if type(value) is not int or not 0 <= value < 2**63:
        raise AtomLensError(f"seed is {value!r}, allowed are the integers from 0 to 2**63 - 1")
    return value
