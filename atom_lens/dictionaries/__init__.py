"""Kinds of dictionaries, each in a file that registers it: ours, sae-lens' stock SAEs, bases, nulls."""

# Each registers its kinds, and tables list them in this order.
from atom_lens.dictionaries import baselines, nulls  # isort: skip
from atom_lens.dictionaries.tsae import kinds as _tsae  # noqa: F401  # isort: skip
from atom_lens.dictionaries import aip_topk as _topk  # noqa: F401  # isort: skip
from atom_lens.dictionaries.pursuit import training as _pursuit  # noqa: F401  # isort: skip
from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.dictionaries.registry import (
    Drawn,
    Fixed,
    Kind,
    Learner,
    Setup,
    Trained,
    find_kind,
    kind,
    kinds,
    recipes_kind,
    register,
)

__all__ = [
    "Dictionary",
    "Drawn",
    "Fixed",
    "Kind",
    "Learner",
    "Setup",
    "Trained",
    "baselines",
    "find_kind",
    "kind",
    "kinds",
    "nulls",
    "recipes_kind",
    "register",
]
