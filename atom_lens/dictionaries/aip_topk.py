"""TopK in the coordinates of the atomic inner product: the amortised dictionary that a pursuit starts from.

sae-lens' TopK training SAE, with the loss in a norm between the AIP and the Euclidean one, a start from data by option,
and noise on what the encoder reads. What it becomes is a plain sae-lens ``topk`` SAE on raw activations.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.metered import training_whitening
from atom_lens.dictionaries.registry import Learner, Setup, Trained, register
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row

ARCHITECTURE = "aip_topk"


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
    normalize_activations: Literal[
        "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"
    ] = "covariance_whitening"

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

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

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["loss_weight"]


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
    return Learner(sae, whitening=whitening, calibration=setup.calibration)


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


def as_plain(sae: AIPTopKTraining) -> SAE[Any]:
    """The TopK SAE that it has become, through the files that sae-lens writes."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=str(sae.device))


def _finish(learner: Learner, aip: AtomicInnerProduct) -> SAE[Any]:
    assert isinstance(learner.sae, AIPTopKTraining)
    return as_plain(learner.sae)


register(
    Trained(
        name=ARCHITECTURE,
        label="TopK in the AIP (ours)",
        role="ours",
        color="#d6506a",
        marker="P",
        least=1.0,
        start=_start,
        finish=_finish,
    )
)
SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_training_class(ARCHITECTURE, AIPTopKTraining, AIPTopKTrainingConfig)
