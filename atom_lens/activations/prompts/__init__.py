"""Prompt sources: a class for each place that prompts come from, one per file, discovered here."""

from typing import get_args

from atom_lens.activations.prompts.source import Source
from atom_lens.discover import import_all

import_all(__name__)

# The name in a recipe -> its class.
SOURCES: dict[str, type[Source]] = {
    name: kind for kind in Source.__subclasses__() for name in get_args(kind.model_fields["source"].annotation)
}
