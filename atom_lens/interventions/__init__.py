"""Edits of codes, and splicing them into live models."""

from atom_lens.interventions.edits import Edit, Place
from atom_lens.interventions.splice import Splice, splice

__all__ = ["Edit", "Place", "Splice", "splice"]
