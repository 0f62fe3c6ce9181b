"""Mixing: batches from a stream of activations, which come in the order of the text, through a buffer in memory.

sae-lens' `mixing_buffer` does the same from the global generator; this one can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.activations.stream import Stream
from atom_lens.training.checkpoint import Checkpoints


class Mixing:
    """Endless batches, the same rows of every hook, drawn from about the last `buffer_size` rows of the stream.

    Args:
        stream: the source of activations.
        batch_size: rows of a batch.
        buffer_size: rows of the buffer, at least two batches; half of them are replaced at each refill.
        seed: of the mixing.
        shuffled: name -> hook: another stream, the activations of that hook with every coordinate permuted
            independently over the rows of a batch.
        rows: how many will be asked for: then the last ones are not read only to mix others with. None is endless.

    Attributes:
        checkpoints: written between two steps, if any.
        together: several processes read it together, batch by batch.
    """

    together = True

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        buffer_size: int,
        seed: int,
        shuffled: Mapping[str, str] | None = None,
        rows: int | None = None,
    ) -> None:
        self.stream, self.batch_size, self.size = stream, batch_size, max(buffer_size, 2 * batch_size)
        self.missing = rows  # rows still to be read
        self.shuffled = dict(shuffled or {})
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer: dict[str, Tensor] = {}
        self.checkpoints: Checkpoints | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What distinguishes this source of batches from others."""
        return {
            "streams": self.stream.limits,
            "context_size": self.stream.context_size,
            "known_contexts": self.stream.known_contexts,
            "buffer_size": self.size,
        }

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        # The trainer asks for a batch between two steps: the only moment when its state is consistent.
        if self.checkpoints is not None:
            self.checkpoints.keep_if_due()
        while self._left < self.batch_size or not self.buffer:
            self._fill()
        batch = {hook: x[: self.batch_size] for hook, x in self.buffer.items()}
        self.buffer = {hook: x[self.batch_size :] for hook, x in self.buffer.items()}
        return batch | {name: self._permuted(batch[hook]) for name, hook in self.shuffled.items()}

    @property
    def _left(self) -> int:
        """Rows that may be returned before the next refill: half of the buffer stays, to be mixed with new rows."""
        return self._held - (0 if self.missing is not None and self.missing <= 0 else self.size // 2)

    @property
    def _held(self) -> int:
        return len(next(iter(self.buffer.values()))) if self.buffer else 0

    def _fill(self) -> None:
        room = self.size - self._held
        new = self.stream.read(min(room, self.missing) if self.missing is not None and self.missing > 0 else room)
        if self.missing is not None:
            self.missing -= len(next(iter(new.values())))
        whole = {hook: torch.cat([self.buffer[hook], x]) if self.buffer else x for hook, x in new.items()}
        order = torch.randperm(len(next(iter(whole.values()))), generator=self.generator)
        self.buffer = {hook: x[order] for hook, x in whole.items()}

    def _permuted(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return x.gather(0, torch.rand(x.shape, generator=self.generator).argsort(dim=0))

    def state(self) -> dict[str, Any]:
        """Everything that future batches depend on."""
        return {
            "buffer": self.buffer,
            "generator": self.generator.get_state(),
            "stream": self.stream.state(),
            "missing": self.missing,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`."""
        self.buffer, self.missing = state["buffer"], state["missing"]
        self.generator.set_state(state["generator"])
        self.stream.restore(state["stream"])
