"""What everything that measures or uses a dictionary expects of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from atom_lens.dictionaries.learning import Learning
from atom_lens.dictionaries.metered import WHITENED
from atom_lens.errors import AtomLensError


@runtime_checkable
class Dictionary(Protocol):
    """Rows `W_dec` of shape (F, d), `encode` to codes (n, F), `decode` back to (n, d): any sae-lens SAE has it."""

    if TYPE_CHECKING:  # at run time Python 3.12 checks plain attributes only, and a module's parameters are not

        @property
        def W_dec(self) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


def check_folded(dictionary: Any, what: str) -> None:
    """Refuse an SAE from the middle of a whitened training: sae-lens loads it, and runs it on raw activations.

    Raises:
        AtomLensError: its whitening is not folded into its weights.
    """
    if isinstance(dictionary, Learning):
        raise AtomLensError(f"{what} is still in training, its atoms are in whitened space: use its finish()")
    if getattr(getattr(dictionary, "cfg", None), "normalize_activations", None) == WHITENED:
        raise AtomLensError(
            f"{what} is from the middle of a training: its weights act on whitened activations and would be wrong on "
            "raw ones; use the result of the training"
        )
