"""A stream of activations: a model reads documents for as long as activations are asked for; nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.documents import contexts
from atom_lens.activations.harvest import read_activations
from atom_lens.activations.positions import Read, tokens_to_read
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError

_NOTHING = "the stream has no training documents that can be read: give more documents"


class Stream:
    """Activations of all tokens of some documents at some hooks, in one forward pass for all hooks.

    After the last document the first follows again. Several processes (`parallel`) read the same stream together, each
    running the model on its share of the contexts.

    Args:
        backend: the model.
        documents: returns the documents from the first on, the same at every call.
        limits: the hooks, and the largest norm at each: a row beyond one of them is left out at all of them.
        context_size: tokens that the model reads at a time, the beginning-of-sequence token included.
        prepend_bos: put a beginning-of-sequence token before every context.
        without: prefixes (`positions.prefixes`) that are not read.

    Attributes:
        passes: how often the end of the documents was reached.
        taken: contexts read since then.
    """

    def __init__(
        self,
        backend: Backend,
        documents: Callable[[], Iterable[Prompt]],
        limits: Mapping[str, float],
        context_size: int,
        prepend_bos: bool,
        without: set[int],
    ) -> None:
        self.backend, self.documents, self.limits, self.without = backend, documents, dict(limits), without
        self.context_size, self.prepend_bos = context_size, prepend_bos
        self.passes = self.taken = 0
        self._contexts: Iterator[tuple[Prompt, int]] | None = None

    def read(self, n: int) -> dict[str, Float[Tensor, "m _"]]:
        """hook -> the next activations, of at least `n` tokens, the same rows for every hook.

        Raises:
            AtomLensError: there is nothing to read.
        """
        began = self.passes
        while not (reads := self._reads(n)):
            if self.passes > began + 1:
                raise AtomLensError(_NOTHING)
        found = read_activations(self.backend, reads, list(self.limits), shared=True)
        within = _all(x.norm(dim=1) <= self.limits[hook] for hook, x in found.items())
        return {hook: x[within] for hook, x in found.items()}

    def _reads(self, n: int) -> list[Read]:
        return tokens_to_read(
            self.backend.tokenizer,
            self._next(n),
            "all",
            max_tokens=self.context_size,
            prepend_bos=self.prepend_bos,
            without=self.without,
        )

    def _next(self, n: int) -> Sequence[Prompt]:
        chosen: list[Prompt] = []
        began = self.passes
        while n > 0:
            if self._contexts is None:
                self._contexts = contexts(self.documents(), self.backend.tokenizer, self.context_size, self.prepend_bos)
            one = next(self._contexts, None)
            if one is None:
                if self.passes > began and not chosen:
                    raise AtomLensError(_NOTHING)
                self.passes, self.taken, self._contexts = self.passes + 1, 0, None
                continue
            chosen.append(one[0])
            self.taken += 1
            n -= one[1]
        return chosen

    def state(self) -> dict[str, Any]:
        """Its place in the documents, as plain numbers."""
        return {"passes": self.passes, "taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`: documents before it are read again, but not by the model."""
        self.passes = state["passes"]
        self._contexts = contexts(self.documents(), self.backend.tokenizer, self.context_size, self.prepend_bos)
        for self.taken in range(1, state["taken"] + 1):
            next(self._contexts)


def _all(masks: Iterable[Bool[Tensor, " m"]]) -> Bool[Tensor, " m"]:
    first, *others = masks
    for mask in others:
        first = first & mask
    return first
