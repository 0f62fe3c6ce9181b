"""Other encoders for the atoms of any dictionary: they tell how much its atoms are worth, and how much its encoder.

`Refit` keeps the atoms that a dictionary chooses and fits their coefficients by least squares; `under_pursuit` lets a
pursuit choose. Random directions and data points get the encoder of the dictionary that they are compared with.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries.protocol import Dictionary
from atom_lens.dictionaries.pursuit.sae import PursuitSAE, PursuitSAEConfig, pursuit_map
from atom_lens.errors import AtomLensError
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows

_CALIBRATION_ROWS = 8192
_SAME = 1e-10  # ridge of the Gram matrix of chosen unit atoms: copies of one atom make it singular


class Refit:
    """A dictionary whose coefficients are fitted by least squares, in the norm of a metric, over the atoms it chose.

    Args:
        dictionary: its atoms, and its choice of atoms, are kept.
        metric: coefficients are fitted in its norm.
        bias: the constant part of reconstructions, shape (d,): subtracted before the fit, added after.
    """

    def __init__(self, dictionary: Dictionary, metric: AtomicInnerProduct, bias: Float[Tensor, " d"]) -> None:
        self.dictionary, self.bias = dictionary, bias
        self.W_dec: Float[Tensor, "F d"] = dictionary.W_dec.detach().float()
        self.map = pursuit_map(metric, 0.0).to(self.W_dec.device)
        mapped = self.W_dec.double() @ self.map
        self.norms = mapped.norm(dim=1).clamp(min=1e-30)
        self.units = mapped / self.norms[:, None]

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n F"]:
        own = self.dictionary.encode(x.to(self.dictionary.W_dec.dtype))
        most = int((own != 0).sum(dim=1).max())
        if most == 0:
            return torch.zeros_like(own, dtype=torch.float32)
        at = (own != 0).to(torch.int8).topk(most, dim=1).indices
        used = own.gather(1, at) != 0
        chosen = self.units[at] * used[..., None]
        gram = chosen @ chosen.mT
        gram.diagonal(dim1=1, dim2=2).add_(_SAME + (~used).double())
        rows = (x.double() - self.bias.double()) @ self.map
        values = torch.linalg.solve(gram, chosen @ rows[..., None])[..., 0] * used / self.norms[at]
        return torch.zeros(own.shape, device=own.device).scatter_(1, at, values.float())

    def decode(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n d"]:
        return feature_acts @ self.W_dec + self.bias


@torch.no_grad()
def under_pursuit(
    atoms: Float[Tensor, "F d"],
    bias: Float[Tensor, " d"],
    metric: AtomicInnerProduct,
    x: Float[Tensor | Rows, "n d"],
    l0: float,
    norm: float = 0.0,
    cap: float = 3.0,
) -> PursuitSAE:
    """Atoms under a threshold-activated pursuit whose threshold gives a mean L0.

    Args:
        atoms: rows; zero rows are left out.
        bias: subtracted before and added after, shape (d,).
        metric: of the pursuit.
        x: activations on which codes have that mean, shape (n, d); up to 8,192 of them are used.
        l0: the mean asked for.
        norm: alpha, see `PursuitSAEConfig`.
        cap: most atoms of a code, as a multiple of `l0`.

    Raises:
        AtomLensError: no atoms.
    """
    atoms = atoms.detach()
    atoms = atoms[atoms.norm(dim=1) > 0]
    if not len(atoms):
        raise AtomLensError("atoms has no rows that are not zero, a pursuit needs at least one")
    most = max(1, min(round(cap * l0), *atoms.shape))
    config = PursuitSAEConfig(
        d_in=atoms.shape[1], d_sae=len(atoms), max_iterations=most, norm=norm, device=str(atoms.device)
    )
    with torch.random.fork_rng(devices=[]):  # initial weights, to be overwritten
        sae = PursuitSAE(config)
    sae.W_dec.copy_(atoms)
    sae.b_dec.copy_(bias)
    sae.aip = metric
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_CALIBRATION_ROWS]
    sae.calibrate(x[drawn.to(x.device)].to(sae.W_dec), l0)
    return sae


def bias_of(dictionary: Dictionary) -> Float[Tensor, " d"]:
    """What a dictionary reconstructs from an empty code, shape (d,)."""
    atoms = dictionary.W_dec
    with torch.no_grad():
        return dictionary.decode(torch.zeros(1, len(atoms), dtype=atoms.dtype, device=atoms.device))[0].float()
