"""Edits of codes, splicing them into live models, and whether they do what they say."""

from atom_lens.interventions.attribution import attribution, read
from atom_lens.interventions.causal import Evaluation, known, swaps
from atom_lens.interventions.edits import Edit, Place
from atom_lens.interventions.facts import ask, divergence
from atom_lens.interventions.splice import Splice, splice

__all__ = [
    "Edit",
    "Evaluation",
    "Place",
    "Splice",
    "ask",
    "attribution",
    "divergence",
    "known",
    "read",
    "splice",
    "swaps",
]
