"""TSAE: the threshold-activated sparse autoencoder in the atomic inner product, as an sae-lens architecture.

sae-lens' JumpReLU SAE on raw activations, with the metric beside it; `tsae_training` trains it (theory.md section 3).
Importing this module registers the architecture ``aip_tsae``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    register_sae_class,
)
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.folder import AIP_FILENAME, check_atoms
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.storage.sealed import sealed_folder

ARCHITECTURE = "aip_tsae"
HEADS = "hook_z"  # the one hook whose heads sae-lens merges, and its name for doing so
WHITENED = "covariance_whitening"  # sae-lens' mark of weights that live in whitened space


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


class TSAE(JumpReLUSAE):
    """Atoms, ready to use: ``encode`` and ``decode`` act on raw activations, ``aip`` is the metric they live in.

    ``W_dec`` holds one atom per row, of unit Euclidean norm; coherence does not depend on the norm.
    """

    aip_eigenvalues: Tensor
    aip_eigenvectors: Tensor

    def __init__(self, cfg: JumpReLUSAEConfig, use_error_term: bool = False) -> None:
        if cfg.normalize_activations == WHITENED:
            raise AtomLensError(
                "this is a checkpoint from the middle of training: its weights act on whitened activations and "
                "would be silently wrong on raw ones; load the final atoms, or resume the training from it"
            )
        if str(cfg.metadata.hook_name).endswith(f".{HEADS}"):
            cfg.reshape_activations = HEADS
        super().__init__(cfg, use_error_term)

    @override
    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Take heads apart, (..., n_heads, d_head), as well as side by side, (..., d_in), and give back the same."""
        super().turn_on_forward_pass_hook_z_reshaping()
        self.d_head = None
        self.reshape_fn_in, self.reshape_fn_out = self._side_by_side, self._apart

    def _side_by_side(self, x: Tensor) -> Tensor:
        self.d_head = None if x.shape[-1] == self.cfg.d_in else x.shape[-1]
        return x if self.d_head is None else x.flatten(-2)

    @staticmethod
    def _apart(x: Tensor, d_head: int | None) -> Tensor:
        return x if d_head is None else x.unflatten(-1, (-1, d_head))

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        d = self.cfg.d_in
        self.register_buffer("aip_eigenvalues", torch.ones(d, dtype=torch.float64, device=self.device))
        self.register_buffer("aip_eigenvectors", torch.eye(d, dtype=torch.float64, device=self.device))

    @property
    def aip(self) -> AtomicInnerProduct:
        """The metric these atoms were trained in."""
        about = self.cfg.metadata.aip or {"n": 0, "ridge": 0.0, "source": "none: Euclidean"}
        return AtomicInnerProduct.from_eigen(self.aip_eigenvalues, self.aip_eigenvectors, **about)

    @aip.setter
    def aip(self, aip: AtomicInnerProduct) -> None:
        if aip.width != self.cfg.d_in:
            raise AtomLensError(f"the metric has width {aip.width}, these atoms have d_in {self.cfg.d_in}")
        self.aip_eigenvalues = aip.eigenvalues.to(self.W_dec.device)
        self.aip_eigenvectors = aip.eigenvectors.to(self.W_dec.device)
        self.cfg.metadata.aip = {"n": aip.n, "ridge": aip.ridge, "source": aip.source}

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TSAE:
        # .to(bfloat16) may move the metric but not round it: a bf16 metric is off by 1e-3.
        exact = {name: self._buffers.pop(name) for name in ("aip_eigenvalues", "aip_eigenvectors")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            assert value is not None
            self.register_buffer(name, value.to(fn(value).device))
        return self

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in ("aip_eigenvalues", "aip_eigenvectors"):
            del state_dict[name]
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # Weights alone (a plain jumprelu file) come without a metric; `load_atoms` adds it from the sidecar.
        d = self.cfg.d_in
        state_dict.setdefault("aip_eigenvalues", torch.ones(d, dtype=torch.float64))
        state_dict.setdefault("aip_eigenvectors", torch.eye(d, dtype=torch.float64))

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write a plain ``jumprelu`` folder that sae-lens loads alone, the metric beside it, and a manifest."""
        path = Path(path)
        with sealed_folder(path) as folder:
            self.write_files(folder)
        return path / SAE_WEIGHTS_FILENAME, path / SAE_CFG_FILENAME

    def write_files(self, folder: Path) -> None:
        """Write config, weights and metric without a manifest; what could not be read back is an AtomLensError."""
        if not self.cfg.metadata.aip:
            self.aip = self.aip  # say in the config, too, that there is none
        super().save_model(folder)
        self.aip.save(folder / AIP_FILENAME)
        check_atoms(folder)


# A second registration is an error in sae-lens, and a notebook may reload this module: the newest classes count.
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
register_sae_class(ARCHITECTURE, TSAE, TSAEConfig)
