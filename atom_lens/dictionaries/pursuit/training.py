"""The pursuit dictionary while it learns: first with a TopK encoder, then under the pursuit itself.

The loss needs no derivative of the pursuit: codes minimise it on their support, so by the envelope theorem its gradient
with respect to atoms is the one at fixed codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from typing_extensions import override

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.aip_topk import (
    AIPTopKTraining,
    AIPTopKTrainingConfig,
)
from atom_lens.dictionaries.learning import loss_weight
from atom_lens.dictionaries.pursuit.omp import Codes, pursue
from atom_lens.dictionaries.pursuit.sae import ARCHITECTURE, PursuitSAE, PursuitSAEConfig, calibrated
from atom_lens.dictionaries.registry import Learner, Setup, Trained, finish, register
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows

_PACE = 0.1  # how fast the threshold follows the L0 of a batch
_CALIBRATION_ROWS = 8192


@dataclass
class PursuitTrainingConfig(AIPTopKTrainingConfig):
    """Training configuration of a pursuit dictionary; `k` is the mean L0 asked for.

    Args:
        amortised_steps: steps with a TopK encoder of K = k, before those under the pursuit.
        max_iterations: most atoms of a code.
        norm: alpha of the pursuit: 0 is the AIP, 1 Euclidean; `loss_norm` is that of the steps before.
        prune: whether atoms are removed at the end of a pursuit (`pursue`).
        coherence_coefficient: weight of the coherence penalty (`coherence_penalty`), relative to a share of variance.
    """

    k: float = 8.0  # pyright: ignore[reportIncompatibleVariableOverride]
    amortised_steps: int = 1000
    max_iterations: int = 32
    norm: float = 0.0
    prune: bool = False
    coherence_coefficient: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[PursuitSAEConfig]:
        return PursuitSAEConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= min(self.max_iterations, self.d_sae):
            raise AtomLensError(
                f"k is {self.k:g}, allowed is 1 to max_iterations={self.max_iterations} and d_sae={self.d_sae}"
            )
        if not 0 <= self.norm <= 1:
            raise AtomLensError(f"norm is {self.norm}, allowed is 0 (AIP) to 1 (Euclidean)")
        if not self.coherence_coefficient >= 0:
            raise AtomLensError(f"coherence_coefficient is {self.coherence_coefficient}, allowed is 0 or more")


def coherence_penalty(atoms: Float[Tensor, "F d"]) -> Float[Tensor, ""]:
    """The sum of an atom's squared coherences with all others, averaged over atoms; Euclidean, for atoms of any norm.

    This is the frame potential (Benedetto and Fickus 2003) over F, less 1: 0 for orthogonal atoms, never below
    F/d - 1. It is computed from the d x d matrix of second moments; no F x F matrix is needed.
    """
    units = normalize(atoms, dim=1)
    return (units.T @ units).square().sum() / len(units) - 1


class PursuitTraining(AIPTopKTraining):
    """The pursuit dictionary while it trains: `begin`, or the first activations, set the metric and the start."""

    cfg: PursuitTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: Tensor  # of each atom, all the same
    learned: Tensor  # number of steps so far
    norm_weight: Tensor
    pursuit_weight: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("threshold", torch.zeros(self.cfg.d_sae, dtype=torch.float64, device=self.device))
        self.register_buffer("learned", torch.zeros((), dtype=torch.int64))
        for name in ("norm_weight", "pursuit_weight"):
            self.register_buffer(name, torch.ones(self.cfg.d_in, dtype=torch.float32, device=self.device))

    @override
    def get_activation_fn(self) -> TopK:
        return TopK(round(self.cfg.k), use_sparse_activations=self.cfg.use_sparse_activations)

    @override
    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        super().prepare(y, aip, generator)
        self.norm_weight.copy_((aip.eigenvalues / aip.eigenvalues[-1]) ** (self.cfg.norm / 2))
        self.pursuit_weight.copy_(loss_weight(y, aip, self.cfg.norm))

    @torch.no_grad()
    def pursued(self, y: Float[Tensor, "n d"], tau: float) -> Codes:
        """Codes of rows in training coordinates; coefficients are those of atoms of unit AIP norm."""
        atoms = self.W_dec * self.norm_weight
        norms = atoms.norm(dim=1, keepdim=True)
        rows = (y - self.b_dec) * self.norm_weight
        codes = pursue(rows, atoms / norms, most=self.cfg.max_iterations, tau=tau, prune=self.cfg.prune)
        return Codes(codes.support, codes.values / norms[codes.support, 0], codes.count)

    @override
    def encode(self, x: Tensor) -> Tensor:
        if float(self.threshold[0]) == 0:
            return super().encode(x)
        y = self.scaler(self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype))))
        codes = self.pursued(y.reshape(-1, y.shape[-1]), float(self.threshold[0])).dense(self.cfg.d_sae)
        codes = codes * self.W_dec.norm(dim=1)  # `decode` of a TopK divides by it
        return self.hook_sae_acts_post(codes.to(self.dtype).reshape(*y.shape[:-1], -1))

    @override
    def learn(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.learned += 1
        amortised = bool(self.learned <= self.cfg.amortised_steps)
        step = super().learn(step_input) if amortised else self._learn_pursued(step_input)
        if weight := self.cfg.coherence_coefficient:
            step.losses["coherence_loss"] = weight * coherence_penalty(self.W_dec)
            step.loss = step.loss + step.losses["coherence_loss"]
        return step

    def _learn_pursued(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.project()
        x = step_input.sae_in
        if float(self.threshold[0]) == 0:
            start = calibrated(lambda tau: float(self.pursued(x, tau).count.double().mean()), self.cfg.k)
            self.threshold.fill_(start)
        codes = self.pursued(x, float(self.threshold[0]))
        found = float(codes.count.double().mean())
        self.threshold.mul_(1 + _PACE * max(-1.0, min(1.0, found / self.cfg.k - 1)))
        out = embedding_bag(codes.support, self.W_dec, per_sample_weights=codes.values, mode="sum") + self.b_dec
        loss = ((out - x).square() * self.pursuit_weight).sum(dim=-1).mean()
        active = torch.arange(codes.support.shape[1], device=x.device) < codes.count[:, None]
        rows = active.nonzero()[:, 0]
        acts = torch.sparse_coo_tensor(
            torch.stack([rows, codes.support[active]]), codes.values[active], (len(x), self.cfg.d_sae)
        )
        return TrainStepOutput(x, out, acts, acts, loss, {"mse_loss": loss})

    @override
    @torch.no_grad()
    def finish(self) -> PursuitSAE:
        atoms = cast("PursuitSAE", super().finish())
        if self.aip is not None:
            atoms.fold_W_dec_norm()
        return atoms


def _start(setup: Setup, level: float, seed: int) -> Learner:
    asked = setup.atoms.pursuit
    config = PursuitTrainingConfig(
        d_in=setup.aip.width,
        ridge=setup.aip.ridge,
        seed=seed,
        d_sae=setup.atoms.capacity,
        k=level,
        device=pick_device(setup.device),
        loss_norm=0.0,
        start=asked.start,
        noise=asked.noise,
        norm=asked.norm,
        prune=asked.prune,
        coherence_coefficient=asked.coherence_coefficient,
        max_iterations=min(setup.aip.width, setup.atoms.capacity, max(1, round(asked.cap * level))),
        amortised_steps=round(asked.amortised * setup.steps),
        metadata=SAEMetadata(**setup.metadata),
    )
    return Learner.begun(lambda: PursuitTraining(config), setup, seed)


def _finish(learner: Learner, aip: AtomicInnerProduct) -> PursuitSAE:
    atoms, rows = finish(learner, aip), learner.calibration
    assert isinstance(atoms, PursuitSAE)
    if rows is not None:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_ROWS]
        atoms.calibrate(rows[drawn.to(rows.device)].to(atoms.W_dec), learner.sae.cfg.k)
    return atoms


register(
    Trained(
        name=ARCHITECTURE,
        label="pursuit in the AIP (ours)",
        role="ours",
        color="#d6506a",
        marker="*",
        least=1.0,
        start=_start,
        finish=_finish,
    )
)
SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_training_class(ARCHITECTURE, PursuitTraining, PursuitTrainingConfig)
