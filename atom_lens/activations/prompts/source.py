"""A prompt source: a section of a recipe that says where prompts come from, and reads them."""

from __future__ import annotations

from collections.abc import Iterator

from atom_lens.activations.prompts.prompt import Prompt
from atom_lens.storage.schema import Section


class Source(Section):
    """Each subclass has a field `source`: the Literal of the names that it has in recipes."""

    def read(self) -> list[Prompt]:
        """The prompts.

        Raises:
            AtomLensError: they cannot be read; one sentence that says where and why.
        """
        raise NotImplementedError

    def documents(self) -> Iterator[Prompt]:
        """The prompts one by one, for sources of more text than fits in memory; as `read` gives them."""
        return iter(self.read())
