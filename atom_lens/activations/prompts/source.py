"""A prompt source: the section of a recipe that says where prompts come from, and reads them."""

from __future__ import annotations

from collections.abc import Iterator

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.storage.schema import Section


class Source(Section):
    """Each subclass has a field `source`, a Literal of the names that it has in recipes."""

    def read(self) -> list[Prompt]:
        """The prompts.

        Raises:
            AtomLensError: they cannot be read; the message says where and why.
        """
        raise NotImplementedError

    def documents(self) -> Iterator[Prompt]:
        """The prompts of `read` one by one, for sources of more text than fits in memory."""
        return iter(self.read())
