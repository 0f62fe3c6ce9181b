"""The dictionaries that a study measures, as recipes name them: kinds by name, and pretrained SAEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, model_validator
from pydantic_core import PydanticCustomError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries import Kind, kinds
from atom_lens.errors import AtomLensError
from atom_lens.recipe.recipe import Name
from atom_lens.storage.schema import Section


def measured_kinds() -> list[Kind]:
    """Kinds that a recipe may name: all but nulls, which are always measured."""
    return [one for one in kinds() if one.role != "null"]


def _known(name: str) -> str:
    allowed = [one.name for one in measured_kinds()]
    if name not in allowed:
        raise PydanticCustomError("kind", "{allowed}", {"allowed": ", ".join(allowed)})
    return name


KindName = Annotated[str, AfterValidator(_known)]
KINDS = AliasChoices("kinds", "units")  # the second is how recipes of older runs call them


class Features(Section):
    """A pretrained sae-lens SAE: `release` and `sae_id` from its registry or the Hub, or a folder at `path`."""

    name: Name
    release: str | None = None
    sae_id: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Features:
        if (self.path is None) == (self.release is None) or (self.release is None) != (self.sae_id is None):
            raise AtomLensError(f"features {self.name!r} needs either path, or both release and sae_id")
        return self

    @model_validator(mode="after")
    def _no_kind(self) -> Features:
        if self.name in {one.name for one in kinds()}:
            raise AtomLensError(f"features have name {self.name!r}, allowed are names that no kind of dictionary has")
        return self


def pretrained(features: Features, device: str) -> SAE[Any]:
    """A pretrained sae-lens SAE, from a folder or from its registry."""
    device = pick_device(device)
    if features.path is not None:
        if not (Path(features.path) / SAE_CFG_FILENAME).is_file():
            raise AtomLensError(f"features {features.name!r}: no {SAE_CFG_FILENAME} in path {features.path!r}")
        return SAE.load_from_disk(features.path, device=device)
    return SAE.from_pretrained(str(features.release), str(features.sae_id), device=device)
