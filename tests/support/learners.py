"""TSAEs at their start, for tests that train some."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from atom_lens import AtomicInnerProduct
from atom_lens.dictionaries import Learner, Setup
from atom_lens.dictionaries.tsae import kinds
from atom_lens.recipe.sections import Atoms
from atom_lens.tensors.rows import Rows


def tsae_learner(
    x: Float[Tensor | Rows, "n d"],
    aip: AtomicInnerProduct,
    atoms: Atoms,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Learner:
    """The TSAE that `atoms` describes."""
    return kinds.start(Setup(x, aip, atoms, device), atoms.target_l0, seed, atoms.encoder, **options)
