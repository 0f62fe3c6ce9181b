"""TopK in the coordinates of the atomic inner product: the amortised dictionary that a pursuit starts from.

sae-lens' TopK training SAE, with the loss in a norm between the AIP and the Euclidean one, a start from data by option,
and noise on what the encoder reads. What it becomes is a plain sae-lens ``topk`` SAE on raw activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAEConfig, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.metered import METRIC, Metered, training_whitening
from atom_lens.dictionaries.registry import Learner, Setup, Trained, register
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row

ARCHITECTURE = "aip_topk"


@dataclass
class AIPTopKConfig(TopKSAEConfig):
    """Configuration of a trained TopK SAE in the AIP. It saves itself as ``topk``: any sae-lens tool can run it."""

    # sae-lens' from_dict hands a plain dict to __init__ and puts the SAEMetadata in its place afterwards.
    metadata: Any = field(default_factory=SAEMetadata)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": TopKSAEConfig.architecture()}


class AIPTopK(Metered, TopKSAE):
    """TopK atoms on raw activations, with the metric they were trained in; on disk a plain ``topk`` SAE."""

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in METRIC:
            del state_dict[name]
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # Weights alone (a plain topk file) come without a metric; `load_atoms` adds it from the sidecar.
        state_dict.setdefault("aip_eigenvalues", torch.ones(self.cfg.d_in, dtype=torch.float64))
        state_dict.setdefault("aip_eigenvectors", torch.eye(self.cfg.d_in, dtype=torch.float64))


@dataclass
class AIPTopKTrainingConfig(TopKTrainingSAEConfig):
    """Training configuration of a TopK SAE in the AIP.

    Args:
        loss_norm: alpha; the residual is weighted by the eigenvalues of C to this power. 0 is the AIP norm, 1 the
            Euclidean one (theory.md section 3).
        start: "random" takes directions uniform under the metric as first atoms, "data" centred training activations.
        noise: expected square norm of the Gaussian noise that is added to what the encoder reads in training, as a
            share of that of the activation.
    """

    loss_norm: float = 0.0
    start: Literal["data", "random"] = "random"
    noise: float = 0.0
    decoder_init_norm: float | None = 1.0
    normalize_activations: Literal["none", "expected_average_only_in", "layer_norm", "covariance_whitening"] = (
        "covariance_whitening"
    )

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return AIPTopKConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.loss_norm <= 1:
            raise AtomLensError(f"loss_norm is {self.loss_norm}, allowed is 0 (AIP) to 1 (Euclidean)")
        if self.start not in ("data", "random"):
            raise AtomLensError(f"start is {self.start!r}, allowed are 'data' and 'random'")
        if not self.noise >= 0:
            raise AtomLensError(f"noise is {self.noise}, allowed is 0 or more")


class AIPTopKTraining(TopKTrainingSAE):
    """TopK while it trains, in training coordinates (`training_whitening`). Call `prepare` before."""

    cfg: AIPTopKTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    loss_weight: Tensor
    generator: torch.Generator

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("loss_weight", torch.ones(self.cfg.d_in, dtype=torch.float32, device=self.device))

    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        """Set the weights of the loss, the first atoms and the bias.

        Args:
            y: training activations in training coordinates, shape (n, d).
            aip: the metric, whose eigenvalues weight the loss.
            generator: draws first atoms, and the noise while they learn.
        """
        self.generator = torch.Generator(self.W_dec.device).manual_seed(
            int(torch.randint(1 << 31, (), generator=generator))
        )
        average = mean_row(y)
        weight = (aip.eigenvalues / aip.eigenvalues[-1]).to(average.device) ** self.cfg.loss_norm
        self.loss_weight.copy_(share_of_variance(y, weight))
        self.b_dec.copy_(average)
        n_data = min(len(y), self.cfg.d_sae) if self.cfg.start == "data" else 0
        drawn = torch.randperm(len(y), generator=generator)[:n_data].to(y.device)
        self.W_dec[:n_data] = (y[drawn] - average).to(self.W_dec)
        directions = torch.randn(self.cfg.d_sae - n_data, self.cfg.d_in, generator=generator)
        self.W_dec[n_data:] = directions.to(self.W_dec)
        self.project()
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def project(self) -> None:
        """Give atoms unit AIP norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and self.cfg.noise:
            drawn = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
            x = x + drawn * (self.cfg.noise / self.cfg.d_in) ** 0.5
        return super().encode_with_hidden_pre(x)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.project()
        self.mse_loss_fn = lambda prediction, target: (prediction - target).square() * self.loss_weight
        return super().training_forward_pass(step_input)

    @torch.no_grad()
    def finish(self, aip: AtomicInnerProduct, calibration: Float[Tensor | Rows, "n d"] | None = None) -> Metered:
        """The trained SAE on raw activations, with its metric; it has no threshold to be set on `calibration`."""
        if self.cfg.normalize_activations != "none":
            raise AtomLensError("the whitening is not folded in yet: run the trainer's fit() to its end first")
        config = {**self.cfg.get_inference_sae_cfg_dict(), "architecture": ARCHITECTURE}
        sae = AIPTopK(AIPTopKConfig.from_dict(config)).to(self.W_dec.device)
        sae.load_state_dict(self.state_dict(), strict=False)
        sae.aip = aip
        return sae


def share_of_variance(y: Float[Tensor | Rows, "n d"], weight: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """`weight` scaled so that the loss is the share of (weighted) variance left unexplained, whatever the model."""
    average = mean_row(y)
    parts = [(rows.double() - average).square().sum(dim=0) for rows in y.split(8192)]
    variance = torch.stack(parts).sum(dim=0).to(weight) / len(y)
    return weight / (weight * variance).sum()


def start_learner(kind: type[AIPTopKTraining], config: AIPTopKTrainingConfig, setup: Setup, seed: int) -> Learner:
    """A learner of one of these classes at its start on the activations of `setup`."""
    # sae-lens draws initial weights from the global generator, to be overwritten: leave the user's as it was.
    with torch.random.fork_rng(devices=[]):
        sae = kind(config)
    whitening = training_whitening(setup.aip)
    y = (setup.x if isinstance(setup.x, Rows) else Rows(setup.x)).through(whitening.matrix)
    sae.prepare(y, setup.aip, torch.Generator().manual_seed(seed))
    return Learner(sae, setup.stream, whitening, setup.calibration)


def _start(setup: Setup, level: float, seed: int) -> Learner:
    config = AIPTopKTrainingConfig(
        d_in=setup.aip.width,
        d_sae=setup.atoms.capacity,
        k=round(level),
        device=pick_device(setup.device),
        loss_norm=setup.atoms.pursuit.norm,
        start=setup.atoms.pursuit.start,
        noise=setup.atoms.pursuit.noise,
        metadata=SAEMetadata(**setup.metadata),
    )
    return start_learner(AIPTopKTraining, config, setup, seed)


def finish(learner: Learner, aip: AtomicInnerProduct) -> Metered:
    """What a learner of one of these classes has become, on raw activations, with its metric."""
    assert isinstance(learner.sae, AIPTopKTraining)
    with torch.random.fork_rng(devices=[]):
        return learner.sae.finish(aip, learner.calibration)


register(
    Trained(
        name=ARCHITECTURE,
        label="TopK in the AIP (ours)",
        role="ours",
        color="#d6506a",
        marker="P",
        least=1.0,
        start=_start,
        finish=finish,
    )
)
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_class(ARCHITECTURE, AIPTopK, AIPTopKConfig)
register_sae_training_class(ARCHITECTURE, AIPTopKTraining, AIPTopKTrainingConfig)
