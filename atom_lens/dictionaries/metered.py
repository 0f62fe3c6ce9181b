"""What dictionaries with a metric add to sae-lens' SAEs: the metric itself, exact through `.to()`, and hook_z."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.training.activation_scaler import ActivationWhitening
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.folder import AIP_FILENAME, check_atoms
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.storage.sealed import sealed_folder

HEADS = "hook_z"  # the one hook whose heads sae-lens merges, and its name for doing so
WHITENED = "covariance_whitening"  # sae-lens' mark of weights that live in whitened space
METRIC = ("aip_eigenvalues", "aip_eigenvectors")
TRAINED_IN = "aip_about"  # only in weights saved during training
_IN_TRAINING = (
    "this is a checkpoint from the middle of training: its weights act on whitened activations and would be silently "
    "wrong on raw ones; load the final atoms, or resume training from it"
)

if TYPE_CHECKING:
    _Base = SAE[Any]
else:
    _Base = object


class Metered(_Base):
    """A mixin for sae-lens' SAE classes: `aip` is the metric of the atoms.

    The metric is kept as two float64 buffers, its eigenvalues and eigenvectors; `.to(bfloat16)` never rounds it,
    because a metric in bfloat16 is off by 1e-3.
    """

    aip_eigenvalues: Tensor
    aip_eigenvectors: Tensor
    of_training: ClassVar[tuple[str, ...]] = ("loss_weight",)  # tensors that only training classes have

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        if cfg.normalize_activations == WHITENED:
            raise AtomLensError(_IN_TRAINING)
        if str(cfg.metadata.hook_name).endswith(f".{HEADS}"):
            cfg.reshape_activations = HEADS
        super().__init__(cfg, use_error_term)

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
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Metered:
        exact = {name: self._buffers.pop(name) for name in METRIC}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            assert value is not None
            self.register_buffer(name, value.to(fn(value).device))
        return self

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write a folder that sae-lens loads, with the metric and a manifest in it."""
        path = Path(path)
        with sealed_folder(path) as folder:
            self.write_files(folder)
        return path / SAE_WEIGHTS_FILENAME, path / SAE_CFG_FILENAME

    def write_files(self, folder: Path) -> None:
        """Write config, weights and metric without a manifest; files that could not be read back are refused."""
        if not self.cfg.metadata.aip:
            self.aip = self.aip  # the config, too, says that there is none
        super().save_model(folder)
        self.aip.save(folder / AIP_FILENAME)
        check_atoms(folder)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in METRIC:
            del state_dict[name]
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        if TRAINED_IN in state_dict:
            raise AtomLensError(_IN_TRAINING)
        for name in self.of_training:
            state_dict.pop(name, None)
        # Weights alone (a plain jumprelu or topk file) come without a metric; `load_atoms` adds it from the sidecar.
        state_dict.setdefault("aip_eigenvalues", torch.ones(self.cfg.d_in, dtype=torch.float64))
        state_dict.setdefault("aip_eigenvectors", torch.eye(self.cfg.d_in, dtype=torch.float64))

    @torch.no_grad()
    def leave_training(self, aip: AtomicInnerProduct) -> None:
        """Map atoms and biases from training coordinates under `aip` to raw activations."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
        whitening = training_whitening(aip)
        self.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
        self.aip = aip

    @override
    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Accept heads separate, (..., n_heads, d_head), or merged, (..., d_in), and return them in the same shape."""
        super().turn_on_forward_pass_hook_z_reshaping()
        self.d_head = None
        self.reshape_fn_in, self.reshape_fn_out = self._side_by_side, self._apart

    def _side_by_side(self, x: Tensor) -> Tensor:
        self.d_head = None if x.shape[-1] == self.cfg.d_in else x.shape[-1]
        return x if self.d_head is None else x.flatten(-2)

    @staticmethod
    def _apart(x: Tensor, d_head: int | None) -> Tensor:
        return x if d_head is None else x.unflatten(-1, (-1, d_head))


def training_whitening(aip: AtomicInnerProduct) -> ActivationWhitening:
    """The map into training coordinates: the eigenbasis of C, with the same second moment in every direction.

    y = Vᵀx / sqrt(lambda d) is a rotation of S^{1/2} x / sqrt(d): inner products are the AIP's, an activation has mean
    square norm 1, and a loss weighted by eigenvalues is diagonal.
    """
    scale = (aip.eigenvalues * aip.width).sqrt()
    return ActivationWhitening(
        mean=torch.zeros(aip.width, dtype=torch.float64),
        matrix=(aip.eigenvectors / scale).cpu().contiguous(),
        inverse_matrix=(aip.eigenvectors * scale).T.cpu().contiguous(),
    )
