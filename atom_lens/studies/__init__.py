"""Studies: each a command, a recipe, a result, and its tables and figures."""

from atom_lens.discover import import_all

import_all(__name__)
