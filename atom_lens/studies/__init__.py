"""Studies: each has a command, a section of a recipe, a result, and its tables and plots."""

from atom_lens.discover import import_all

import_all(__name__)
