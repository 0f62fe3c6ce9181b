"""The pursuit dictionary: threshold-activated matching pursuit in the AIP, as an sae-lens architecture.

There is no encoder matrix: a code is found one atom at a time, each in the residual of those before (`omp.pursue`). The
condition mu < 1 / (2K - 1), which q* asks of atoms, is the one under which this finds every K-sparse code (Tropp 2004).
Importing this module registers the architecture ``aip_pursuit``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from sae_lens import SAE, SAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from typing_extensions import override

from atom_lens.dictionaries.folder import CONFIGS, AtomsConfig
from atom_lens.dictionaries.metered import Metered
from atom_lens.dictionaries.pursuit.nearest import Nearest
from atom_lens.dictionaries.pursuit.omp import Codes, lengths, pursue
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct

ARCHITECTURE = "aip_pursuit"


@dataclass
class PursuitSAEConfig(SAEConfig):
    """Configuration of a pursuit dictionary.

    Args:
        max_iterations: most atoms of a code.
        norm: alpha: correlations, coefficients and thresholds are taken in the norm that weights residuals by the
            eigenvalues of C to this power. 0 is the AIP, 1 Euclidean (theory.md section 3).
        prune: whether atoms that lower the error by less than their threshold asks are removed at the end (`pursue`).
    """

    max_iterations: int = 32
    norm: float = 0.0
    prune: bool = False
    # sae-lens' from_dict passes a plain dict to __init__ and replaces it by the SAEMetadata afterwards.
    metadata: Any = field(default_factory=SAEMetadata)

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iterations < 1:
            raise AtomLensError(f"max_iterations is {self.max_iterations}, allowed is at least 1")
        if not 0 <= self.norm <= 1:
            raise AtomLensError(f"norm is {self.norm}, allowed is 0 (AIP) to 1 (Euclidean)")


class PursuitSAE(Metered, SAE[PursuitSAEConfig]):
    """Atoms under a pursuit: ``encode`` and ``decode`` act on raw activations, ``aip`` is the metric of the atoms.

    ``W_dec`` holds one atom per row, of any norm but zero. ``threshold`` is the smallest correlation with which each
    atom joins a code, in training coordinates, where an activation has mean square norm 1 (`pursuit_map`).
    """

    of_training = (*Metered.of_training, "W_enc", "b_enc", "learned", "norm_weight", "pursuit_weight")
    threshold: torch.nn.Parameter
    _ready: tuple[tuple[int, ...], Nearest, Tensor, Tensor] | None = None

    # The first step of a pursuit reads activations along these directions, later steps the residual.
    @property
    def W_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Reading directions of the first step, shape (d, F)."""
        map = pursuit_map(self.aip, self.cfg.norm)
        units = torch.nn.functional.normalize(self.W_dec.double() @ map)
        return (map @ units.T).to(self.W_dec)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name != "W_enc":  # sae-lens gives every SAE an encoder matrix
            super().__setattr__(name, value)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold = torch.nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():  # the metric is part of the encoder and saved with it
            state_dict[name] = value.contiguous()

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Map atoms and bias from whitened space to raw activations; there is no encoder to map."""
        back = unwhitening_matrix.to(self.device)
        self.W_dec.copy_(self.W_dec.to(back.dtype) @ back)
        self.b_dec.copy_(self.b_dec.to(back.dtype) @ back + mean.to(back))

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Give rows unit Euclidean norm: coefficients scale, and the choice of atoms stays the same."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-30))

    def _prepared(self) -> tuple[Nearest, Float[Tensor, "d d"], Float[Tensor, " F"]]:
        """Unit atoms ready to be searched, the map into pursuit coordinates, and the atoms' norms there.

        Cached while neither the atoms nor the metric change: a live model encodes one token at a time.
        """
        map = pursuit_map(self.aip, self.cfg.norm)
        mapped = self.W_dec.detach().double() @ map
        norms = mapped.norm(dim=1)
        if not bool((norms > 0).all()):
            raise AtomLensError(f"atom {int((norms == 0).nonzero()[0])} has norm 0, allowed is any other norm")
        return Nearest((mapped / norms[:, None]).float()), map, norms

    def _mapped(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Nearest, Float[Tensor, " F"]]:
        """Activations in pursuit coordinates, the unit atoms there, and the norms they had."""
        version = (self.W_dec._version, self.aip_eigenvalues._version, id(self.aip_eigenvalues), self.W_dec.data_ptr())
        if self._ready is None or self._ready[0] != version:
            self._ready = version, *self._prepared()
        _, nearest, map, norms = self._ready
        return ((x - self.b_dec).double() @ map).float(), nearest, norms

    def find(self, x: Float[Tensor, "n d"]) -> Codes:
        """Sparse codes of raw activations: at most `max_iterations` atoms each, coefficients of rows of `W_dec`."""
        y, nearest, norms = self._mapped(x)
        tau = self.threshold.detach().float()
        codes = pursue(
            y.detach(),
            nearest.units,
            most=self.cfg.max_iterations,
            tau=float(tau[0]) if bool((tau == tau[0]).all()) else tau,  # one for all is faster by a third
            prune=self.cfg.prune,
            search=nearest,
        )
        values = codes.values
        if torch.is_grad_enabled() and y.requires_grad:
            values = refitted(y, nearest.units, codes)
        return Codes(codes.support, values / norms[codes.support].to(values), codes.count)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "n d"], l0: float) -> None:
        """Set one threshold for all atoms, at which codes of `x` have `l0` atoms on average.

        Args:
            x: raw activations, shape (n, d); not those trained on, whose codes are shorter at the same threshold.
            l0: the mean asked for, at most `max_iterations`.
        """

        def pruned(tau: float) -> Tensor:
            self.threshold.fill_(tau)
            return self.find(x).count

        y, nearest, _ = self._mapped(x)
        most = self.cfg.max_iterations
        count = pruned if self.cfg.prune else lengths(y, nearest.units, most=most, search=nearest).at
        self.threshold.fill_(calibrated(lambda tau: float(count(tau).double().mean()), l0))

    @override
    def encode(self, x: Tensor) -> Tensor:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        codes = self.find(x.reshape(-1, x.shape[-1])).dense(self.cfg.d_sae)
        return self.hook_sae_acts_post(codes.to(self.dtype).reshape(*x.shape[:-1], -1))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(out, self.d_head)


def calibrated(mean: Callable[[float], float], l0: float) -> float:
    """The threshold tau at which `mean(tau)`, the mean L0 of some codes, is `l0` to 0.5%; 0 where that is out of reach.

    Correlations of rows in training coordinates are seldom above 1 and never by much, so the search begins there.
    """
    low, high = 0.0, 1.0
    while mean(high) > l0:
        low, high = high, 2 * high
    for _ in range(24):
        middle = (low + high) / 2
        found = mean(middle)
        if abs(found - l0) <= 0.005 * l0:
            return middle
        low, high = (middle, high) if found > l0 else (low, middle)
    return low


def refitted(y: Float[Tensor, "n d"], units: Float[Tensor, "F d"], codes: Codes) -> Float[Tensor, "n most"]:
    """The least-squares coefficients of `codes`, as a differentiable function of `y`."""
    used = (torch.arange(codes.support.shape[1], device=y.device) < codes.count[:, None]).to(y)
    chosen = units[codes.support] * used[..., None]
    gram = chosen @ chosen.mT + torch.diag_embed(1 - used)  # slots that are free stand alone
    return torch.linalg.solve(gram, (chosen @ y[..., None]))[..., 0] * used


def pursuit_map(aip: AtomicInnerProduct, norm: float) -> Float[Tensor, "d d"]:
    """From activations to coordinates in which `norm` is Euclidean, float64.

    Columns are eigenvectors times lambda^(alpha/2) / sqrt(lambda d), where the lambda in the power is relative to the
    largest eigenvalue: at alpha = 0 an activation has mean square norm 1.
    """
    power = (aip.eigenvalues / aip.eigenvalues[-1]) ** (norm / 2)
    return aip.eigenvectors * (power / (aip.eigenvalues * aip.width).sqrt())


class _OnDisk(AtomsConfig):
    architecture: Literal["aip_pursuit"]
    max_iterations: int = Field(ge=1)
    norm: float = Field(ge=0, le=1, strict=False)
    prune: bool
    ours: ClassVar[str] = ARCHITECTURE
    tensors: ClassVar[dict[str, str]] = {"threshold": "f", "aip_eigenvalues": "d", "aip_eigenvectors": "dd"}


CONFIGS["aip_pursuit"] = _OnDisk
SAE_CLASS_REGISTRY.pop(ARCHITECTURE, None)  # a notebook may reload this module
register_sae_class(ARCHITECTURE, PursuitSAE, PursuitSAEConfig)
