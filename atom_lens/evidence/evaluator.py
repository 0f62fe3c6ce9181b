"""An evaluator for sae-lens' trainers: it logs the evidence on held-out activations during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from atom_lens.dictionaries.learning import Learning
from atom_lens.evidence.measure import measure
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.tensors.rows import Rows, float32_rows

AnyRows = Float[Tensor | Rows | np.ndarray, "n d"]


class AtomEvaluator:
    """An evaluator for `SAETrainer` and, as `several`, for `MultiSAETrainer`; for SAEs of any architecture.

    ``SAETrainer(cfg, sae, batches, AtomEvaluator(x))`` logs `atoms/r2`, `atoms/r2_aip`, `atoms/q_star`, `atoms/l0`,
    `atoms/l0_p998`, `atoms/empty_codes`, `atoms/dead` and `atoms/coherence_p998` wherever sae-lens logs, W&B included.
    The runner has an evaluator of its own: ``runner.evaluator = AtomEvaluator(x, then=runner.evaluator)`` keeps both.

    Args:
        x: raw activations that are not trained on, shape (n, d); a mapping by stream if there are several.
        aip: the metric; None estimates it from `x`. A mapping by stream if there are several.
        then: another evaluator, whose metrics are logged as well.
    """

    def __init__(
        self,
        x: AnyRows | Mapping[str, AnyRows],
        aip: AtomicInnerProduct | Mapping[str, AtomicInnerProduct] | None = None,
        then: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        given = x if isinstance(x, Mapping) else {"": x}
        self.x = {name: float32_rows(check_rows(rows, f"x {name}".strip())) for name, rows in given.items()}
        metrics = aip if isinstance(aip, Mapping) else dict.fromkeys(self.x, aip)
        self.aip = {name: metrics.get(name) or AtomicInnerProduct.estimate(rows) for name, rows in self.x.items()}
        self.then = then

    def __call__(
        self, sae: TrainingSAE[Any], data_provider: Any, activation_scaler: ActivationScaler
    ) -> dict[str, Any]:
        """Metrics of one SAE in training."""
        found = self.then(sae, data_provider, activation_scaler) if self.then else {}
        return {**found, **self._measured(sae, activation_scaler, next(iter(self.x)), "atoms/")}

    def several(
        self,
        saes: dict[str, TrainingSAE[Any]],
        data_provider: Any,
        activation_scalers: dict[str, ActivationScaler],
        hook_names: dict[str, str],
    ) -> dict[str, Any]:
        """Metrics of all SAEs whose stream has activations here."""
        found = self.then(saes, data_provider, activation_scalers, hook_names) if self.then else {}
        for name, sae in saes.items():
            stream = hook_names[name] if hook_names[name] in self.x else ""
            if stream in self.x:
                found |= self._measured(sae, activation_scalers[name], stream, f"{name}/atoms/")
        return found

    def _measured(self, sae: TrainingSAE[Any], scaler: ActivationScaler, stream: str, prefix: str) -> dict[str, float]:
        if isinstance(sae, Learning) and sae.aip is None:
            return {}  # the metric and the start are not known yet
        figures = measure(_InTraining(sae, scaler), self.x[stream], self.aip[stream])
        found = {
            "r2": figures.r2,
            "r2_aip": figures.r2_aip,
            "q_star": figures.q_star,
            "l0": figures.l0.mean,
            "l0_p998": figures.l0.p998,
            "empty_codes": figures.empty_codes,
            "dead": figures.dead_atoms,
            "coherence_p998": figures.coherence.p998,
        }
        return {f"{prefix}{name}": float(value) for name, value in found.items()}


class _InTraining:
    """An SAE in training, acting on raw activations: sae-lens' trainer scales or whitens them before the SAE."""

    def __init__(self, sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
        # Our own scale by themselves.
        self.sae, self.scaler = sae, ActivationScaler() if isinstance(sae, Learning) else scaler
        whitening = (sae.scaler if isinstance(sae, Learning) else scaler).whitening
        atoms = sae.W_dec.detach().float()
        self.W_dec: Float[Tensor, "F d"] = atoms if whitening is None else atoms @ whitening.inverse_matrix.to(atoms)

    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n F"]:
        with torch.no_grad():
            codes = self.sae.encode(self.scaler.scale(x))
            return codes.to_dense() if codes.is_sparse else codes

    def decode(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n d"]:
        with torch.no_grad():
            return self.scaler.unscale(self.sae.decode(feature_acts))
