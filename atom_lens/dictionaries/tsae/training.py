"""The TSAE while it trains: in whitened coordinates, by sae-lens' trainer, which folds the whitening back at the end.

Importing this module registers the training class of ``aip_tsae`` with sae-lens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.registry import (
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_training_class,
)
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationWhitening
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.tsae.sae import ARCHITECTURE, TSAE, WHITENED, TSAEConfig
from atom_lens.dictionaries.tsae.search import Search
from atom_lens.dictionaries.tsae.sparse import Entries, sparse_decode, sparse_encode
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row

DENSITY_LIMIT = 0.08  # share of entries; dense steps are faster from 0.09 to 0.16 on (docs/performance.md)


@dataclass
class TSAETrainingConfig(JumpReLUTrainingSAEConfig):
    """Training configuration of a TSAE; ``target_l0`` is required.

    Args:
        target_l0: wanted number of active atoms of every activation.
        l0_coefficient: weight of sae-lens' quadratic loss 2 (K_i - target_l0)² / target_l0, averaged over activations,
            beside a share of variance: q* lives in the tail of K, so each activation is held to the target, not the
            mean.
        encoder: "tied" keeps W_enc = D S as in the identifiability theorem, "free" learns it.
        loss_norm: alpha; the residual is weighted by the eigenvalues of C to this power. 0 is the AIP norm, 1 the
            Euclidean one (theory.md section 3).
        noise: expected square norm of the Gaussian noise that is added to what the encoder reads in training, as a
            share of that of the activation. Keeps thresholds and codes as they are on activations never seen.
        revival: weight of the auxiliary loss in which dead atoms explain what the living leave over.
        start: "data" takes centred training activations as first atoms, "random" directions uniform under the metric.
        freeze_decoder: random directions that stay as they are, a null; the encoder still learns if it is free.
        jumprelu_bandwidth: width of the straight-through window, in units of the norm of a whitened activation.
        step: "sparse" computes gradients at active entries and those inside the window only, where the others are
            zero; the same up to rounding, and faster while few are active (docs/performance.md). Forward hooks of the
            SAE do not fire then, `feature_acts` and `hidden_pre` of the step's output are sparse tensors of these
            entries, and steps in which many are active are dense all the same.
        encoder_product: of sparse steps. "bfloat16" looks for the entries in a product of that precision, with a margin
            that misses none, and computes those it found in the precision of the weights: the same up to rounding.
    """

    encoder: Literal["tied", "free"] = "free"
    loss_norm: float = 0.75
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "quadratic"
    l0_coefficient: float = 0.15
    noise: float = 0.3
    revival: float = 1 / 32
    start: Literal["data", "random"] = "data"
    freeze_decoder: bool = False
    step: Literal["dense", "sparse"] = "sparse"
    encoder_product: Literal["float32", "bfloat16"] = "float32"
    jumprelu_ste_to_input: bool = True
    normalize_activations: Literal["none", "expected_average_only_in", "layer_norm", "covariance_whitening"] = WHITENED
    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_l0 is None or not 0 < self.target_l0 <= self.d_sae:
            raise AtomLensError(
                f"target_l0 is {self.target_l0}, allowed is a number above 0 and up to d_sae={self.d_sae}"
            )
        if self.encoder not in ("tied", "free"):
            raise AtomLensError(f"encoder is {self.encoder!r}, allowed are 'tied' and 'free'")
        if self.start not in ("data", "random"):
            raise AtomLensError(f"start is {self.start!r}, allowed are 'data' and 'random'")
        if self.step not in ("dense", "sparse"):
            raise AtomLensError(f"step is {self.step!r}, allowed are 'dense' and 'sparse'")
        if self.encoder_product not in ("float32", "bfloat16"):
            raise AtomLensError(f"encoder_product is {self.encoder_product!r}, allowed are 'float32' and 'bfloat16'")
        if self.step == "sparse" and (
            self.jumprelu_sparsity_loss_mode == "tanh" or self.pre_act_loss_coefficient is not None
        ):
            raise AtomLensError("step is 'sparse', allowed with the tanh loss or a pre_act_loss_coefficient is 'dense'")
        if not 0 <= self.loss_norm <= 1:
            raise AtomLensError(f"loss_norm is {self.loss_norm}, allowed is 0 (AIP) to 1 (Euclidean)")


class TSAETraining(JumpReLUTrainingSAE):
    """The TSAE while it trains, in whitened coordinates scaled so that an activation has mean square norm 1.

    Call `prepare` before training; `finish` after, which gives the `TSAE`.
    """

    cfg: TSAETrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    loss_weight: Tensor
    density: Tensor
    generator: torch.Generator
    search: Search

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("loss_weight", torch.ones(self.cfg.d_in, dtype=torch.float32, device=self.device))
        self.register_buffer("density", torch.zeros((), dtype=torch.float64))
        self.search = Search(self.cfg.encoder_product)
        if self.cfg.step == "sparse":
            # Rows of W_encᵀ lie together: that is how its gradient comes about, and it need not be turned.
            self.W_enc.data = self.W_enc.data.T.contiguous().T
        self.W_enc.requires_grad_(self.cfg.encoder == "free")
        self.W_dec.requires_grad_(not self.cfg.freeze_decoder)

    @staticmethod
    def whitening(aip: AtomicInnerProduct) -> ActivationWhitening:
        """The map into training coordinates: the eigenbasis of C, each direction scaled alike.

        A rotation of S^{1/2} x / sqrt(d), so inner products are the AIP's, and the loss weights are diagonal.
        """
        scale = (aip.eigenvalues * aip.width).sqrt()
        return ActivationWhitening(
            mean=torch.zeros(aip.width, dtype=torch.float64),
            matrix=(aip.eigenvectors / scale).cpu().contiguous(),
            inverse_matrix=(aip.eigenvectors * scale).T.cpu().contiguous(),
        )

    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        """Start from the data: atoms are whitened activations, thresholds give the wanted L0, the bias is the mean.

        Measured on the demo model, this start beats random directions by far, in and out of sample
        (docs/training.md).

        Args:
            y: training activations in training coordinates (`whitening`), shape (n, d).
            aip: the metric, whose eigenvalues weight the loss.
            generator: draws the activations that become atoms, and the noise while they learn.
        """
        seed = int(torch.randint(1 << 31, (), generator=generator))
        self.generator = torch.Generator(self.W_dec.device).manual_seed(seed)
        here = self.W_dec
        average = mean_row(y)
        squares = torch.stack([(rows.double() - average).square().sum(dim=0) for rows in y.split(8192)])
        mean, variance = average.to(here), (squares.sum(dim=0) / len(y)).to(here)
        weight = (aip.eigenvalues / aip.eigenvalues[-1]).to(here) ** self.cfg.loss_norm
        # The loss is then the share of (weighted) variance left unexplained, whatever the model and the norm.
        self.loss_weight.copy_(weight / (weight * variance).sum())
        self.b_dec.copy_(mean)

        from_data = self.cfg.start == "data" and not self.cfg.freeze_decoder
        n_data = min(len(y), self.cfg.d_sae) if from_data else 0
        drawn = torch.randperm(len(y), generator=generator)[:n_data].to(y.device)
        self.W_dec[:n_data] = y[drawn].to(here) - mean
        self.W_dec[n_data:] = torch.randn(self.cfg.d_sae - n_data, self.cfg.d_in, generator=generator).to(here)
        self._project()
        self.W_enc.copy_(self.W_dec.T)
        drawn = torch.randperm(len(y), generator=generator)[:512].to(y.device)
        sample = (y[drawn].to(here) - mean) @ self.W_dec.T
        active = min(sample.numel() - 1, max(1, math.ceil(len(sample) * float(self.cfg.target_l0 or 1))))
        self.threshold.fill_(float(sample.flatten().kthvalue(sample.numel() - active).values))

    @torch.no_grad()
    def _project(self) -> None:
        """Atoms have unit AIP norm, as in the theorem."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w_enc = self.W_dec.T if self.cfg.encoder == "tied" else self.W_enc
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(self._noisy(x)) @ w_enc + self.b_enc)
        threshold = self.threshold.to(hidden_pre.dtype)
        codes = JumpReLU.apply(hidden_pre, threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input)
        return self.hook_sae_acts_post(codes), hidden_pre

    def _noisy(self, x: Tensor) -> Tensor:
        if not (self.training and self.cfg.noise):
            return x
        noise = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
        return x + noise * (self.cfg.noise / self.cfg.d_in) ** 0.5

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._project()
        # What the last step found says whether this one is worth going through entry by entry.
        if self.cfg.step == "sparse" and float(self.density) < DENSITY_LIMIT:
            return self._sparse_forward_pass(step_input)
        self.mse_loss_fn = lambda prediction, target: (prediction - target).square() * self.loss_weight
        output = super().training_forward_pass(step_input)
        if self.cfg.step == "sparse":
            near = output.hidden_pre > self.threshold - self.bandwidth / 2
            self.density.fill_(int(near.sum()) / near.numel())
        return output

    def _sparse_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The same losses as of a dense step, with gradients at the entries where they are not zero."""
        x = step_input.sae_in
        directions = self.W_dec if self.cfg.encoder == "tied" else self.W_enc.T
        with torch.no_grad():
            seen = self.process_sae_in(self._noisy(x))
            cutoff = self.threshold - self.bandwidth / 2 - self.b_enc  # adding b_enc would copy a matrix
            entries, found = self.search(seen, directions, cutoff.to(seen))
            found = found + self.b_enc[entries.columns]
            self.density.fill_(len(entries.rows) / (len(x) * self.cfg.d_sae))

        def pre(found: Tensor, at: Entries) -> Tensor:
            b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
            return sparse_encode(found, seen, directions, self.b_enc, b_dec, at)

        # sae-lens' own estimators, on the entries in a row instead of the whole matrix.
        values, threshold = pre(found, entries)[None], self.threshold.to(found)[entries.columns]
        estimator = (threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input)
        codes = JumpReLU.apply(values, *estimator)[0]
        active = Step.apply(values, *estimator)[0]
        l0 = active.new_zeros(len(x)).index_add(0, entries.rows, active)
        sae_out = sparse_decode(codes, self.W_dec, entries) + self.b_dec
        if self.cfg.jumprelu_sparsity_loss_mode == "quadratic":
            target = float(self.cfg.target_l0 or 1)
            l0 = 2 / target * (l0 - target) ** 2
        losses = {
            "mse_loss": ((sae_out - x).square() * self.loss_weight).sum(dim=-1).mean(),
            "l0_loss": (step_input.coefficients["l0"] * l0).mean(),
        }
        dead = step_input.dead_neuron_mask
        if self.cfg.revival and dead is not None and dead.any():
            at, candidates = self._revived(seen, directions, dead)
            left = x - sae_out.detach() - sparse_decode(pre(candidates, at), self.W_dec, at)
            losses["revival_loss"] = self.cfg.revival * (left.square() * self.loss_weight).sum(dim=-1).mean()
        fired, size = codes.detach() > 0, (len(x), self.cfg.d_sae)
        places = torch.stack([entries.rows, entries.columns])
        feature_acts = torch.sparse_coo_tensor(places[:, fired], codes.detach()[fired], size, is_coalesced=True)
        hidden_pre = torch.sparse_coo_tensor(places, found, size, is_coalesced=True)
        loss = torch.stack(list(losses.values())).sum()
        return TrainStepOutput(x, sae_out, feature_acts, hidden_pre, loss, losses)

    @torch.no_grad()
    def _revived(self, seen: Tensor, directions: Tensor, dead: Tensor) -> tuple[Entries, Tensor]:
        """Where the strongest dead atoms would speak, and their pre-activations there."""
        index = dead.nonzero()[:, 0]
        found = torch.addmm(self.b_enc[index], seen, directions[index].T)
        strongest = torch.zeros(len(seen), len(dead), dtype=torch.bool, device=seen.device)
        places = self._strongest(found)
        strongest[torch.arange(len(seen), device=seen.device)[:, None], index[places.indices]] = places.values > 0
        at = Entries.where(strongest)
        column = torch.empty_like(dead, dtype=torch.long)
        column[index] = torch.arange(len(index), device=index.device)
        return at, found[at.rows, column[at.columns]]

    @staticmethod
    def _strongest(candidates: Tensor) -> torch.return_types.topk:
        return candidates.topk(min(64, candidates.shape[1]), dim=1)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        dead = step_input.dead_neuron_mask
        if self.cfg.revival and dead is not None and dead.any():
            losses["revival_loss"] = self._revival(step_input.sae_in - sae_out.detach(), hidden_pre, dead)
        return losses

    def _revival(self, residual: Tensor, hidden_pre: Tensor, dead: Tensor) -> Tensor:
        """The AuxK loss of Gao et al. 2024: the strongest dead atoms reconstruct the residual."""
        candidates = hidden_pre[:, dead]
        strongest, index = self._strongest(candidates)
        codes = torch.zeros_like(candidates).scatter(1, index, strongest.relu())
        left = residual - codes @ self.W_dec[dead]
        return self.cfg.revival * (left.square() * self.loss_weight).sum(dim=-1).mean()

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        self._project()
        if self.cfg.encoder == "tied":
            self.W_enc.copy_(self.W_dec.T)  # in whitened space; after the fold this reads W_enc = S D
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @torch.no_grad()
    def finish(self, aip: AtomicInnerProduct) -> TSAE:
        """The trained atoms on raw activations, rows of unit Euclidean norm, with their metric."""
        if self.cfg.normalize_activations == WHITENED:
            raise AtomLensError("the whitening is not folded in yet: run the trainer's fit() to its end first")
        self.fold_W_dec_norm()
        atoms = TSAE(TSAEConfig.from_dict({**self.cfg.get_inference_sae_cfg_dict(), "architecture": ARCHITECTURE}))
        state = {k: v.detach().clone() for k, v in self.state_dict().items() if k not in _TRAINING_BUFFERS}
        atoms.process_state_dict_for_loading(state)
        atoms.load_state_dict(state)
        atoms.aip = aip
        return atoms


_TRAINING_BUFFERS = ("loss_weight", "density")

SAE_TRAINING_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_training_class(ARCHITECTURE, TSAETraining, TSAETrainingConfig)
