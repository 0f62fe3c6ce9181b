"""TSAE: the threshold-activated sparse autoencoder in the atomic inner product, as an sae-lens architecture.

sae-lens' JumpReLU SAE on raw activations, with its metric; `training` trains it (theory.md section 3).
Importing this module registers the architecture ``aip_tsae``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

from atom_lens.dictionaries.folder import CONFIGS, AtomsConfig
from atom_lens.dictionaries.metered import Metered

ARCHITECTURE = "aip_tsae"


def model_metadata() -> dict[str, Any]:
    """How `sae_lens.load_model` and sae-lens' evals load a model whose hooks have TransformerLens' names."""
    return {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}}


@dataclass
class TSAEConfig(JumpReLUSAEConfig):
    """Configuration of a trained TSAE. It saves itself as ``jumprelu``: any sae-lens tool can run it."""

    # sae-lens' from_dict passes a plain dict to __init__ and replaces it by the SAEMetadata afterwards.
    metadata: Any = field(default_factory=SAEMetadata)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": JumpReLUSAEConfig.architecture()}


class TSAE(Metered, JumpReLUSAE):
    """Atoms, ready to use: ``encode`` and ``decode`` act on raw activations, ``aip`` is the metric of the atoms.

    ``W_dec`` holds one atom per row, of unit Euclidean norm; coherence does not depend on the norm.
    """

    of_training = (*Metered.of_training, "density")


class _OnDisk(AtomsConfig):
    architecture: Literal["jumprelu"]
    ours: ClassVar[str] = ARCHITECTURE
    tensors: ClassVar[dict[str, str]] = {"W_enc": "df", "b_enc": "f", "threshold": "f"}


CONFIGS["jumprelu"] = _OnDisk
# sae-lens refuses a second registration, and a notebook may reload this module: the newest classes win.
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
register_sae_class(ARCHITECTURE, TSAE, TSAEConfig)
