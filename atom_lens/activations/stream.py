"""A stream of activations: a model reads documents for as long as activations are asked for; nothing more is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from atom_lens.activations.backends.protocol import Backend
from atom_lens.activations.documents import contexts
from atom_lens.activations.harvest import read_activations
from atom_lens.activations.positions import Read, tokens_to_read
from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.errors import AtomLensError
from atom_lens.tensors.rows import Rows


class Stream:
    """Activations of all tokens of some documents at some hooks, in one forward pass for all hooks.

    After the last document the first follows again. Several processes (`parallel`) read the same stream together, each
    running the model on its share of the contexts.

    Args:
        opened: the model, loaded when it is first needed.
        documents: returns the documents from the first on, the same at every call.
        tokenizer: that of the model.
        limits: the hooks, and the largest norm at each: a row beyond one of them is left out at all of them.
        context_size: tokens that the model reads at a time, the beginning-of-sequence token included.
        prepend_bos: put a beginning-of-sequence token before every context.
        without: prefixes (`positions.prefixes`) that are not read.
        known: hook -> activations of the first contexts, the same rows at every hook: they begin each pass, and the
            model does not read these contexts again.
        known_contexts: how many contexts they are of.

    Attributes:
        passes: how often the end of the documents was reached.
        taken: contexts read since then, those of `known` included.
        row: rows of `known` handed out since then.
    """

    def __init__(
        self,
        opened: Callable[[], Backend],
        documents: Callable[[], Iterable[Prompt]],
        tokenizer: Any,
        limits: Mapping[str, float],
        context_size: int,
        prepend_bos: bool,
        without: set[int],
        known: Mapping[str, Rows] | None = None,
        known_contexts: int = 0,
    ) -> None:
        self.opened, self.documents, self.tokenizer = opened, documents, tokenizer
        self.limits, self.without = dict(limits), without
        self.context_size, self.prepend_bos = context_size, prepend_bos
        self.known, self.known_contexts = dict(known or {}), known_contexts
        self.n_known = len(next(iter(self.known.values()))) if self.known else 0
        self.passes = self.taken = self.row = 0
        self._contexts: Iterator[tuple[Prompt, int]] | None = None

    def read(self, n: int) -> dict[str, Float[Tensor, "m _"]]:
        """hook -> the next activations, of about `n` tokens, the same rows for every hook.

        Raises:
            AtomLensError: there is nothing to read.
        """
        began = self.passes
        while self.passes <= began + 1:
            if self.row < self.n_known:
                start, self.row = self.row, min(self.row + n, self.n_known)
                return {hook: x[start : self.row] for hook, x in self.known.items()}
            if reads := self._reads(n):
                found = read_activations(self.opened(), reads, list(self.limits), shared=True)
                within = _all(x.norm(dim=1) <= self.limits[hook] for hook, x in found.items())
                return {hook: x[within] for hook, x in found.items()}
        raise AtomLensError("the stream has no training documents that can be read: give more documents")

    def _reads(self, n: int) -> list[Read]:
        """The next contexts, up to the end of the documents."""
        chosen: list[Prompt] = []
        following = self._contexts or self._from(self.known_contexts)
        while n > 0 and (one := next(following, None)) is not None:
            chosen.append(one[0])
            self.taken += 1
            n -= one[1]
        if n > 0:
            self.passes, self.taken, self.row, self._contexts = self.passes + 1, 0, 0, None
        if not chosen:
            return []
        return tokens_to_read(
            self.tokenizer,
            chosen,
            "all",
            max_tokens=self.context_size,
            prepend_bos=self.prepend_bos,
            without=self.without,
        )

    def _from(self, taken: int) -> Iterator[tuple[Prompt, int]]:
        """Go to a context: those before it are cut again, but the model does not read them."""
        self._contexts = contexts(self.documents(), self.tokenizer, self.context_size, self.prepend_bos)
        self.taken = sum(1 for _ in islice(self._contexts, taken))
        return self._contexts

    def state(self) -> dict[str, Any]:
        """Its place in the documents, as plain numbers."""
        return {"passes": self.passes, "taken": self.taken, "row": self.row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`."""
        self.passes, self.row = state["passes"], state["row"]
        self._contexts = None
        if state["taken"]:
            self._from(state["taken"])


def _all(masks: Iterable[Bool[Tensor, " m"]]) -> Bool[Tensor, " m"]:
    first, *others = masks
    for mask in others:
        first = first & mask
    return first
