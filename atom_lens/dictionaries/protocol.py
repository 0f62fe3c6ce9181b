"""What a dictionary is to everything that measures or uses one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Dictionary(Protocol):
    """Rows `W_dec` of shape (F, d), `encode` to codes (n, F), `decode` back to (n, d): any sae-lens SAE has it."""

    if TYPE_CHECKING:  # at run time Python 3.12 looks among plain attributes, where a module has no parameters

        @property
        def W_dec(self) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...
