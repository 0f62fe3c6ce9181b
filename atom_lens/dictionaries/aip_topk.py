"""TopK in the coordinates of the atomic inner product: the amortised dictionary that a pursuit starts from.

sae-lens' TopK training SAE with the loss in a norm between the AIP and the Euclidean one, optionally a start from data,
and noise on the encoder's input. The result is a plain sae-lens ``topk`` SAE on raw activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field
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
from atom_lens.dictionaries.folder import CONFIGS, AtomsConfig
from atom_lens.dictionaries.learning import Learning, LearningConfig
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.registry import Learner, Setup, Trained, finish, register
from atom_lens.errors import AtomLensError

ARCHITECTURE = "aip_topk"


@dataclass
class AIPTopKConfig(TopKSAEConfig):
    """Configuration of a trained TopK SAE in the AIP. It saves itself as ``topk``: any sae-lens tool can run it."""

    # sae-lens' from_dict passes a plain dict to __init__ and replaces it by the SAEMetadata afterwards.
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


@dataclass
class AIPTopKTrainingConfig(LearningConfig, TopKTrainingSAEConfig):
    """Training configuration of a TopK SAE in the AIP."""

    decoder_init_norm: float | None = 1.0

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
        if self.normalize_activations != "none":  # it whitens by its own metric
            raise AtomLensError(
                f"normalize_activations is {self.normalize_activations!r}, allowed for {self.architecture()} is 'none'"
            )


class AIPTopKTraining(Learning, TopKTrainingSAE):
    """TopK while it trains: `begin`, or the first activations, set metric and start; `finish` gives the `AIPTopK`."""

    cfg: AIPTopKTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().encode_with_hidden_pre(self.noisy(x))

    @override
    def learn(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.project()
        self.mse_loss_fn = lambda prediction, target: (prediction - target).square() * self.loss_weight
        return TopKTrainingSAE.training_forward_pass(self, step_input)


def _start(setup: Setup, level: float, seed: int) -> Learner:
    config = AIPTopKTrainingConfig(
        d_in=setup.aip.width,
        ridge=setup.aip.ridge,
        seed=seed,
        d_sae=setup.atoms.capacity,
        k=round(level),
        device=pick_device(setup.device),
        loss_norm=setup.atoms.pursuit.norm,
        start=setup.atoms.pursuit.start,
        noise=setup.atoms.pursuit.noise,
        metadata=SAEMetadata(**setup.metadata),
    )
    return Learner.begun(lambda: AIPTopKTraining(config), setup, seed)


register(
    Trained(
        name=ARCHITECTURE,
        label="TopK in the AIP (ours)",
        role="ours",
        color="#d98a2b",
        marker="P",
        least=1.0,
        start=_start,
        finish=finish,
    )
)


class _OnDisk(AtomsConfig):
    architecture: Literal["topk"]
    k: int = Field(ge=1)
    rescale_acts_by_decoder_norm: bool
    ours: ClassVar[str] = ARCHITECTURE
    tensors: ClassVar[dict[str, str]] = {"W_enc": "df", "b_enc": "f"}


CONFIGS["topk"] = _OnDisk
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)
SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_class(ARCHITECTURE, AIPTopK, AIPTopKConfig)
register_sae_training_class(ARCHITECTURE, AIPTopKTraining, AIPTopKTrainingConfig)
