"""Several processes on one recipe, as `torchrun` starts them: all run the same code, divide its loops, and agree.

Outside `processes` there is one process, and everything here does nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_active = False


@contextmanager
def processes() -> Iterator[None]:
    """Work with the other processes that torchrun started, if it did; they need a shared file system.

    Only code inside this context is divided: a process group of the user's own is left alone.
    """
    global _active
    if _active or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Trainings differ in length: one process may wait hours for another.
    dist.init_process_group(backend, timeout=timedelta(days=7))
    _active = True
    try:
        yield
    finally:
        _active = False
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _active else 1


def rank() -> int:
    """Which of them this is; 0 writes what is written."""
    return dist.get_rank() if _active else 0


def mine(items: Iterable[T]) -> Iterator[T]:
    """Every `size`-th of `items`, from `rank` on."""
    return islice(items, rank(), None, size())


def summed(x: Tensor) -> Tensor:
    """`x` summed over all processes, in place. Exact for integers, and where all processes but one hold zero."""
    return _reduced(x, dist.ReduceOp.SUM)


def largest(x: Tensor) -> Tensor:
    """The maximum of `x` over all processes, in place."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if _active:
        dist.all_reduce(x, operation)
    return x


def in_order(items: Iterable[T], work: Callable[[T], Tensor]) -> Iterator[Tensor]:
    """Apply `work` to `items`, divided among processes; every process gets all results, in the order of the items.

    Sums over them therefore round as they do in one process.
    """
    items = list(items)
    for start in range(0, len(items), size()):
        group = items[start : start + size()]
        if not _active:
            yield work(group[0])
            continue
        own = work(group[rank()]) if rank() < len(group) else work(group[0])
        parts = [torch.empty_like(own) for _ in range(size())]
        dist.all_gather(parts, own)
        yield from parts[: len(group)]


def sent(x: Tensor, source: int) -> Tensor:
    """`x` as process `source` has it, in place."""
    if _active:
        dist.broadcast(x, source)
    return x


def agreed(make: Callable[[], T], source: int = 0) -> T:
    """What `make` returns in process `source`, in every process: a name, a flag, anything that JSON can hold."""
    if not _active:
        return make()
    text = json.dumps(make()).encode() if rank() == source else b""
    length = sent(torch.tensor(len(text)), source)
    letters = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(length)).byte()
    return json.loads(bytes(sent(letters, source).tolist()))


def all_agree(holds: bool) -> bool:
    """Whether something holds in every process."""
    return not largest(torch.tensor(int(not holds)))


def together() -> None:
    """Wait until every process is here."""
    if _active:
        dist.barrier()
