"""All pairs of rows, one tile of products at a time: the n x n matrix never exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.tensors import parallel

T = TypeVar("T")


def over_tiles(
    u: Float[Tensor, "n d"],
    visit: Callable[[slice, slice, Float[Tensor, "rows columns"]], T],
    tile: int = 1024,
) -> Iterator[T]:
    """Yield what `visit` returns for u[rows] u[columns]ᵀ, for every tile with pairs i <= j; diagonal tiles are whole.

    On a CPU each of torch's threads takes tiles of its own: the product costs the same, and the work after it, most
    of which torch does on one thread, is divided too. A tile of 1,024 still fits the cache then. With several
    processes (`parallel`) each visits its share of the tiles, and the caller has to combine their results.

    Args:
        u: rows, shape (n, d).
        visit: called with rows, columns and their products.
        tile: rows and columns of a tile.
    """

    def one(start: tuple[int, int]) -> T:
        rows, columns = (slice(at, at + tile) for at in start)
        return visit(rows, columns, u[rows] @ u[columns].T)

    starts = list(parallel.mine((i, j) for i in range(0, len(u), tile) for j in range(i, len(u), tile)))
    threads = torch.get_num_threads()
    if u.device.type != "cpu" or threads == 1 or len(starts) < 2:
        yield from map(one, starts)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(one, starts)
    finally:
        torch.set_num_threads(threads)


def pairs_of(rows: slice, columns: slice, tile: Float[Tensor, "rows columns"]) -> Float[Tensor, " pairs"]:
    """The pairs i < j of a tile, flat."""
    if rows != columns:
        return tile.flatten()
    row, column = torch.triu_indices(len(tile), len(tile), 1, device=tile.device)
    return tile.take(row.mul_(len(tile)).add_(column))
