"""Learning under a metric: sae-lens' trainers pass raw activations, and the dictionary learns in whitened ones.

Our own training sets the metric and the start of a dictionary (`begin`). sae-lens' loop does not: there the first
activations are kept, and metric and start are taken from them before anything is learned.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.metered import METRIC, TRAINED_IN, Metered, training_whitening
from atom_lens.errors import AtomLensError
from atom_lens.geometry import DEFAULT_RIDGE, AtomicInnerProduct
from atom_lens.tensors.rows import Rows, mean_row, scratch

logger = logging.getLogger(__name__)

_PER_WIDTH = 32  # activations per direction of the metric, unless more are needed for a start
_MASSIVE = 10  # times the median norm: a harvest leaves such rows out

if TYPE_CHECKING:
    _Base = TrainingSAE[Any]
else:
    _Base = object


@dataclass
class LearningConfig:
    """What sae-lens' own loop needs in addition; a mixin for training configurations.

    Args:
        first_activations: how many of the first activations give the metric and the start; none is trained on. 0 takes
            32 per direction, and at least as many as there are atoms.
        ridge: of the metric, relative to the mean eigenvalue of the second moment.
        seed: of the start, and of noise while atoms learn.
        loss_norm: alpha; the residual is weighted by the eigenvalues of C to this power. 0 is the AIP norm, 1 the
            Euclidean one (theory.md section 3).
        start: "data" takes centred training activations as first atoms, "random" directions uniform under the metric.
        noise: expected square norm of the Gaussian noise added to the encoder's input in training, as a share of that
            of the activation.
    """

    first_activations: int = 0
    ridge: float = DEFAULT_RIDGE
    seed: int = 0
    loss_norm: float = 0.0
    start: Literal["data", "random"] = "random"
    noise: float = 0.0


class Learning(_Base):
    """A mixin for training classes of sae-lens; it comes before them in the order of bases.

    A class says how it learns from a batch (`learn`), and may set more at the start than weights, atoms and a bias
    (`prepare`), both in training coordinates (`training_whitening`). ``encode`` and ``decode`` act on raw activations.

    Attributes:
        aip: the metric; None until it is known.
        scaler: into training coordinates and back; the identity until the metric is known.
    """

    aip: AtomicInnerProduct | None = None
    scaler: ActivationScaler
    loss_weight: Tensor
    _generator: torch.Generator | None = None
    _first: Float[Tensor, "n d"] | None = None
    _seen = 0

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.scaler = ActivationScaler()
        self.register_buffer("loss_weight", torch.ones(self.cfg.d_in, dtype=torch.float32, device=self.device))

    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        """Set the weights of the loss, the bias and the first atoms.

        Args:
            y: training activations in training coordinates, shape (n, d).
            aip: the metric, whose eigenvalues weight the loss.
            generator: draws first atoms, and the noise while they learn.
        """
        self._generator = None
        self.generator.manual_seed(int(torch.randint(1 << 31, (), generator=generator)))
        mean = mean_row(y).to(self.W_dec)
        self.loss_weight.copy_(loss_weight(y, aip, self.cfg.loss_norm))
        self.b_dec.copy_(mean)
        n_data = min(len(y), self.cfg.d_sae) if self.cfg.start == "data" else 0
        drawn = torch.randperm(len(y), generator=generator)[:n_data].to(y.device)
        self.W_dec[:n_data] = y[drawn].to(self.W_dec) - mean
        directions = torch.randn(self.cfg.d_sae - n_data, self.cfg.d_in, generator=generator)
        self.W_dec[n_data:] = directions.to(self.W_dec)
        self.project()
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def project(self) -> None:
        """Give atoms unit AIP norm, as in the theorem."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def noisy(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The encoder's input in training: `y`, with noise where the configuration asks for it."""
        if not (self.training and self.cfg.noise):
            return y
        drawn = torch.randn(y.shape, generator=self.generator, device=y.device, dtype=y.dtype)
        return y + drawn * (self.cfg.noise / self.cfg.d_in) ** 0.5

    @property
    def generator(self) -> torch.Generator:
        """Draws the noise; starts again from the seed where sae-lens resumes a saved training."""
        if self._generator is None:
            self._generator = torch.Generator(self.W_dec.device).manual_seed(self.cfg.seed)
        return self._generator

    def learn(self, step_input: TrainStepInput) -> TrainStepOutput:
        """A training step on a batch in training coordinates."""
        raise NotImplementedError

    @torch.no_grad()
    def finish(self) -> Metered:
        """The trained dictionary on raw activations, with its metric; rows get unit norm where that changes no code.

        Raises:
            AtomLensError: the training ended before metric and start were known.
        """
        config = {**self.inference_config(), "architecture": self.cfg.architecture()}
        with torch.random.fork_rng(devices=[]):  # sae-lens draws weights, which are overwritten
            atoms = cast("Metered", SAE.from_dict(config))
        state = {name: value.detach() for name, value in self.state_dict().items()}
        atoms.process_state_dict_for_loading(state)
        atoms.load_state_dict(state)
        if self.aip is not None:
            atoms.leave_training(self.aip)
        return atoms

    def begin(self, x: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        """Start from raw activations `x`, shape (n, d), under the metric `aip`."""
        self._under(aip)
        rows = x if isinstance(x, Rows) else Rows(x)
        self.prepare(rows.through(training_whitening(aip).matrix), aip, generator)

    def _under(self, aip: AtomicInnerProduct) -> None:
        self.aip, self.scaler = aip, ActivationScaler(whitening=training_whitening(aip))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        raw = step_input.sae_in
        if self.aip is None:
            return self._keep(raw)
        scaler, self.scaler = self.scaler, ActivationScaler()  # the whole step is in training coordinates
        try:
            output = self.learn(replace(step_input, sae_in=scaler(raw)))
        finally:
            self.scaler = scaler
        if step_input.is_logging_step:  # explained variance is that of raw activations
            output = replace(output, sae_in=raw, sae_out=scaler.unscale(output.sae_out))
        return output

    @torch.no_grad()
    def _keep(self, x: Float[Tensor, "batch d"]) -> TrainStepOutput:
        """Keep a batch, and begin when there are enough. Nothing is learned from it; every atom counts as alive."""
        needed = self.first_activations
        if self._first is None:
            self._first = scratch(needed, self.cfg.d_in)
        part = x[: needed - self._seen]
        self._first[self._seen : self._seen + len(part)] = part.float().cpu()
        self._seen += len(part)
        if self._seen == needed:
            self._begin_with(self._first)
            self._first = None
        atoms = torch.arange(self.cfg.d_sae, device=x.device)
        once = torch.stack([torch.zeros_like(atoms), atoms])
        acts = torch.sparse_coo_tensor(once, x.new_ones(len(atoms)), (len(x), len(atoms)), is_coalesced=True)
        loss = x.new_zeros((), requires_grad=True)  # it depends on no weight: gradients are None, no optimizer moves
        return TrainStepOutput(x, torch.zeros_like(x), acts, acts, loss, {"mse_loss": loss})

    def _begin_with(self, x: Float[Tensor, "n d"]) -> None:
        source = f"first {len(x)} activations of {self.cfg.metadata.dataset_path or 'training'}"
        norms = x.norm(dim=1)
        if massive := int((norms > _MASSIVE * norms.median()).sum()):
            logger.warning(
                "%d of the %s have more than %d times the median norm and dominate the metric: leave them out, with "
                "exclude_special_tokens in sae-lens' runner",
                *(massive, source, _MASSIVE),
            )
        aip = AtomicInnerProduct.estimate(x, self.cfg.ridge, source)
        self.begin(x, aip, torch.Generator().manual_seed(self.cfg.seed))
        logger.info("metric and start are taken from the %s: training begins", source)

    @property
    def first_activations(self) -> int:
        """How many activations give the metric and the start."""
        return self.cfg.first_activations or max(self.cfg.d_sae, _PER_WIDTH * self.cfg.d_in)

    @override
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(self.scaler(x))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.scaler.unscale(super().decode(feature_acts))

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Write what `finish` returns: a folder that sae-lens loads, with the metric in it."""
        return self.finish().save_model(path)

    def inference_config(self) -> dict[str, Any]:
        """The configuration of the finished dictionary.

        Raises:
            AtomLensError: the training ended before metric and start were known.
        """
        if self.aip is None and self._seen:
            raise AtomLensError(
                f"the training ended after {self._seen} activations, but the first {self.first_activations} only give "
                "the metric and the start: train on more, or lower first_activations"
            )
        config = self.cfg.get_inference_sae_cfg_dict()
        if config["metadata"].get("model_from_pretrained_kwargs"):
            # Programs pass them to whatever loads the model (docs/format.md). What sae-lens' runner itself puts there
            # only repeats its defaults.
            logger.info("left out of metadata: model_from_pretrained_kwargs")
            config["metadata"]["model_from_pretrained_kwargs"] = {}
        return config

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()
        if self.aip is not None:
            # As bytes: sae-lens casts everything it loads to the dtype of the weights, which leaves bytes intact.
            metric = (self.aip.eigenvalues, self.aip.eigenvectors.contiguous())
            state_dict |= {name: value.view(torch.uint8) for name, value in zip(METRIC, metric, strict=True)}
            about = {"n": self.aip.n, "ridge": self.aip.ridge, "source": self.aip.source}
            state_dict[TRAINED_IN] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if TRAINED_IN in state_dict:
            found = [state_dict.pop(name).cpu().to(torch.uint8) for name in (*METRIC, TRAINED_IN)]
            values, vectors = (value.view(torch.float64) for value in found[:2])
            self._under(AtomicInnerProduct.from_eigen(values, vectors, **json.loads(bytes(found[2].tolist()))))


def loss_weight(y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, norm: float) -> Float[Tensor, " d"]:
    """Weights of directions that make a loss the share of (weighted) variance left unexplained, in any model.

    Args:
        y: activations in training coordinates, shape (n, d).
        aip: the metric, whose eigenvalues to the power of `norm` (alpha) are the weights up to scale.
        norm: 0 is the AIP norm, 1 the Euclidean one (theory.md section 3).
    """
    average = mean_row(y)
    squares = torch.stack([(rows.double() - average).square().sum(dim=0) for rows in y.split(8192)])
    variance = (squares.sum(dim=0) / len(y)).float()
    weight = (aip.eigenvalues / aip.eigenvalues[-1]).to(variance) ** norm
    return weight / (weight * variance).sum()
