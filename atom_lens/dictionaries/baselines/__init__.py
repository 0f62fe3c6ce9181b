"""Baselines and controls, a file each: sae-lens' stock SAEs, bases, independent components, greedy data points."""

from atom_lens.discover import import_all

import_all(__name__)
