"""Backends: one file for each library that runs models, discovered here, all with TransformerLens' hook names."""

from typing import TYPE_CHECKING, Literal

from atom_lens.activations.backends.protocol import BACKENDS
from atom_lens.discover import import_all

import_all(__name__)

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[("auto", *sorted(BACKENDS, reverse=True))]
