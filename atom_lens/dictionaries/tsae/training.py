"""The TSAE while it trains: its loss and its start (theory.md section 3).

With y an activation in training coordinates, K its number of active atoms and w the weights of directions,

    loss = |y_hat - y|²_w + l0_coefficient * 2 (K - target_l0)² / target_l0 + revival * |y_hat + y_dead - y|²_w

averaged over a batch: y_dead is what the strongest dead atoms would add (AuxK, Gao et al. 2024). The second term
controls the thresholds: it holds each activation to the target, not their mean, because q* depends on the tail of K.

Importing this module registers the training class of ``aip_tsae`` with sae-lens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_training_class,
)
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.learning import Learning, LearningConfig
from atom_lens.dictionaries.tsae.sae import ARCHITECTURE, TSAE
from atom_lens.dictionaries.tsae.sparse import Read, read_sparsely, strongest
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.recipe.reading import checked
from atom_lens.recipe.sections import Atoms
from atom_lens.tensors.rows import Rows

DENSITY_LIMIT = 0.08  # share of entries; dense steps are faster from 0.09 to 0.16 on (docs/training.md)

_DEFAULT = Atoms.model_construct()
# Fields of a recipe's `atoms` that have another name in sae-lens.
_NAMES = {"capacity": "d_sae", "bandwidth": "jumprelu_bandwidth"}


@dataclass
class TSAETrainingConfig(LearningConfig, JumpReLUTrainingSAEConfig):
    """Training configuration of a TSAE; ``target_l0`` is required.

    Defaults, limits and descriptions are those of a recipe's section `atoms`.
    """

    encoder: Literal["tied", "free"] = _DEFAULT.encoder
    loss_norm: float = _DEFAULT.loss_norm
    l0_coefficient: float = _DEFAULT.l0_coefficient
    noise: float = _DEFAULT.noise
    revival: float = _DEFAULT.revival
    start: Literal["data", "random"] = _DEFAULT.start
    freeze_decoder: bool = False  # keep random directions: a null
    jumprelu_bandwidth: float = _DEFAULT.bandwidth
    step: Literal["dense", "sparse"] = _DEFAULT.step
    encoder_product: Literal["float32", "bfloat16"] = _DEFAULT.encoder_product
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "quadratic"
    jumprelu_ste_to_input: bool = True
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @classmethod
    def of(cls, atoms: Atoms, d_in: int, **others: Any) -> TSAETrainingConfig:
        """The configuration that a recipe's section `atoms` describes."""
        known = {field.name for field in fields(cls)}
        said = {_NAMES.get(name, name): value for name, value in atoms}
        return cls(d_in=d_in, **{name: value for name, value in said.items() if name in known}, **others)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_l0 is None:
            raise AtomLensError(f"target_l0 is missing, allowed is a number above 0 and up to d_sae={self.d_sae}")
        names = {field.name for field in fields(self)}
        asked = {
            name: getattr(self, _NAMES.get(name, name))
            for name in Atoms.model_fields
            if _NAMES.get(name, name) in names
        }
        checked(Atoms, asked, ARCHITECTURE)
        if self.freeze_decoder:
            self.start = "random"
        for name, allowed in (
            ("jumprelu_sparsity_loss_mode", "quadratic"),
            ("pre_act_loss_coefficient", None),  # a TSAE has `revival` instead
            ("normalize_activations", "none"),  # it whitens by its own metric
        ):
            if getattr(self, name) != allowed:
                raise AtomLensError(f"{name} is {getattr(self, name)!r}, allowed for {ARCHITECTURE} is {allowed!r}")
        if self.step == "sparse" and self.dtype not in ("float32", "float64"):
            raise AtomLensError(f"dtype is {self.dtype!r}, allowed with step 'sparse' are 'float32' and 'float64'")


class TSAETraining(Learning, JumpReLUTrainingSAE):
    """The TSAE while it trains: `begin`, or the first activations, set metric and start; `finish` gives the `TSAE`."""

    cfg: TSAETrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    density: Tensor  # share of entries that the last step visited

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("density", torch.zeros((), dtype=torch.float64))
        if self.cfg.step == "sparse":
            # Contiguous rows of W_encᵀ, the layout of its gradient, so that neither is ever transposed.
            self.W_enc.data = self.W_enc.data.T.contiguous().T
        self.W_enc.requires_grad_(self.cfg.encoder == "free")
        self.W_dec.requires_grad_(not self.cfg.freeze_decoder)

    @override
    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        """Start from the data: atoms are whitened activations, thresholds give the target L0, the bias is the mean.

        Measured on the demo model, this start beats random directions by far, in and out of sample
        (docs/training.md).

        Args:
            y: training activations in training coordinates, shape (n, d).
            aip: the metric, whose eigenvalues weight the loss.
            generator: draws the activations that become atoms, and the seed of the noise in training.
        """
        super().prepare(y, aip, generator)
        here, mean = self.W_dec, self.b_dec
        drawn = torch.randperm(len(y), generator=generator)[:512].to(y.device)
        sample = (y[drawn].to(here) - mean) @ self.W_dec.T
        active = min(sample.numel() - 1, max(1, math.ceil(len(sample) * cast(float, self.cfg.target_l0))))
        self.threshold.fill_(float(sample.flatten().kthvalue(sample.numel() - active).values))

    @override
    def learn(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.project()
        y, dead = step_input.sae_in, step_input.dead_neuron_mask
        revived = dead if self.cfg.revival and dead is not None and dead.any() else None
        read = self._read(y, revived)
        target = cast(float, self.cfg.target_l0)
        losses = {
            "mse_loss": self._error(read.out - y),
            "l0_loss": (step_input.coefficients["l0"] * (2 / target * (read.l0 - target) ** 2)).mean(),
        }
        if read.revived is not None:
            losses["revival_loss"] = self.cfg.revival * self._error(y - read.out.detach() - read.revived)
        return TrainStepOutput(y, read.out, read.codes, read.pre, torch.stack(list(losses.values())).sum(), losses)

    def _error(self, residual: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
        return (residual.square() * self.loss_weight).sum(dim=-1).mean()

    def _read(self, y: Float[Tensor, "batch d"], dead: Tensor | None) -> Read:
        """Encode and decode, sparsely where the density of the last step makes this faster; equal up to rounding."""
        if self.cfg.step == "sparse" and float(self.density) < DENSITY_LIMIT:
            read = read_sparsely(self, self.noisy(y), dead)
            self.density.fill_(read.pre._nnz() / read.pre.numel())
            return read
        codes, pre = self.encode_with_hidden_pre(self.noisy(y))
        out = self.decode(codes)
        threshold = self.threshold.to(pre.dtype)
        l0 = Step.apply(pre, threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input).sum(dim=-1)
        if self.cfg.step == "sparse":
            self.density.fill_(int((pre > self.threshold - self.bandwidth / 2).sum()) / pre.numel())
        if dead is None:
            return Read(out, l0, codes, pre)
        values, index = strongest(pre[:, dead])
        return Read(
            out, l0, codes, pre, torch.zeros_like(pre[:, dead]).scatter(1, index, values.relu()) @ self.W_dec[dead]
        )

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w_enc = self.W_dec.T if self.cfg.encoder == "tied" else self.W_enc
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ w_enc + self.b_enc)
        codes = JumpReLU.apply(pre, self.threshold.to(pre.dtype), self.bandwidth, self.cfg.jumprelu_ste_to_input)
        return self.hook_sae_acts_post(codes), pre

    @override
    @torch.no_grad()
    def project(self) -> None:
        """Give atoms unit AIP norm, and keep thresholds from passing negative pre-activations."""
        super().project()
        self.threshold.clamp_(min=0)

    @override
    @torch.no_grad()
    def finish(self) -> TSAE:
        if self.cfg.encoder == "tied":  # after training W_enc = S D
            self.W_enc.copy_((self.W_dec / self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)).T)
        atoms = cast("TSAE", super().finish())
        if self.aip is not None:
            atoms.fold_W_dec_norm()
        return atoms


SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_training_class(ARCHITECTURE, TSAETraining, TSAETrainingConfig)
