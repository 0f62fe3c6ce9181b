"""TSAE: the threshold-activated sparse autoencoder in the atomic inner product, as an sae-lens architecture.

sae-lens' JumpReLU SAE on raw activations, with the metric beside it; `training` trains it (theory.md section 3).
Importing this module registers the architecture ``aip_tsae``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    register_sae_class,
)
from sae_lens.saes.sae import SAEMetadata
from typing_extensions import override

from atom_lens.dictionaries.learning import in_training
from atom_lens.dictionaries.metered import HEADS, METRIC, Metered
from atom_lens.errors import AtomLensError

ARCHITECTURE = "aip_tsae"
WHITENED = "covariance_whitening"  # sae-lens' mark of weights that live in whitened space
_IN_TRAINING = (
    "this is a checkpoint from the middle of training: its weights act on whitened activations and would be silently "
    "wrong on raw ones; load the final atoms, or resume the training from it"
)


def model_metadata() -> dict[str, Any]:
    """How `sae_lens.load_model` and sae-lens' evals are to load a model whose hooks go by TransformerLens' names."""
    return {"model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {}}


@dataclass
class TSAEConfig(JumpReLUSAEConfig):
    """Configuration of a trained TSAE. It saves itself as ``jumprelu``: any sae-lens tool can run it."""

    # sae-lens' from_dict hands a plain dict to __init__ and puts the SAEMetadata in its place afterwards.
    metadata: Any = field(default_factory=SAEMetadata)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": JumpReLUSAEConfig.architecture()}


class TSAE(Metered, JumpReLUSAE):
    """Atoms, ready to use: ``encode`` and ``decode`` act on raw activations, ``aip`` is the metric they live in.

    ``W_dec`` holds one atom per row, of unit Euclidean norm; coherence does not depend on the norm.
    """

    def __init__(self, cfg: JumpReLUSAEConfig, use_error_term: bool = False) -> None:
        if cfg.normalize_activations == WHITENED:
            raise AtomLensError(_IN_TRAINING)
        if str(cfg.metadata.hook_name).endswith(f".{HEADS}"):
            cfg.reshape_activations = HEADS
        super().__init__(cfg, use_error_term)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in METRIC:
            del state_dict[name]
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        if in_training(state_dict):
            raise AtomLensError(_IN_TRAINING)
        for name in ("loss_weight", "density"):  # of a training that has not begun
            state_dict.pop(name, None)
        # Weights alone (a plain jumprelu file) come without a metric; `load_atoms` adds it from the sidecar.
        d = self.cfg.d_in
        state_dict.setdefault("aip_eigenvalues", torch.ones(d, dtype=torch.float64))
        state_dict.setdefault("aip_eigenvectors", torch.eye(d, dtype=torch.float64))


# A second registration is an error in sae-lens, and a notebook may reload this module: the newest classes count.
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
register_sae_class(ARCHITECTURE, TSAE, TSAEConfig)
