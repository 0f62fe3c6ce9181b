"""A one-matrix encoder for pursued atoms: the atoms stay fixed, a TopK encoder learns to find them in one product.

It gives up the accuracy of the pursuit and gains a plain sae-lens ``topk`` SAE, which runs anywhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from typing_extensions import override

from atom_lens.activations.models import pick_device
from atom_lens.dictionaries.aip_topk import AIPTopKTraining, AIPTopKTrainingConfig
from atom_lens.dictionaries.metered import training_whitening
from atom_lens.dictionaries.pursuit.sae import PursuitSAE
from atom_lens.dictionaries.registry import Learner
from atom_lens.geometry import AtomicInnerProduct
from atom_lens.tensors.rows import Rows


class DistilledTraining(AIPTopKTraining):
    """TopK over fixed atoms; only the encoder and the biases learn.

    Args:
        cfg: d_in and d_sae must be those of the atoms.
        atoms: their directions are kept, their bias is the start.
    """

    def __init__(self, cfg: AIPTopKTrainingConfig, atoms: PursuitSAE) -> None:
        super().__init__(cfg)
        self._given: tuple[Tensor, Tensor] = atoms.W_dec.detach().double(), atoms.b_dec.detach().double()

    @override
    @torch.no_grad()
    def prepare(self, y: Float[Tensor | Rows, "n d"], aip: AtomicInnerProduct, generator: torch.Generator) -> None:
        super().prepare(y, aip, generator)
        directions, bias = self._given
        map = training_whitening(aip).matrix.to(directions)
        self.W_dec.copy_(directions @ map)
        self.project()
        self.b_dec.copy_(bias @ map)
        self.W_enc.copy_(self.W_dec.T)
        self.W_dec.requires_grad_(False)


def distilling(atoms: PursuitSAE, x: Float[Tensor | Rows, "n d"], k: int, device: str, seed: int) -> Learner:
    """A learner that will find `atoms` in raw activations `x`, shape (n, d), k at a time."""
    config = AIPTopKTrainingConfig(
        d_in=atoms.cfg.d_in,
        d_sae=atoms.cfg.d_sae,
        k=k,
        device=pick_device(device),
        ridge=atoms.aip.ridge,
        loss_norm=atoms.cfg.norm,
        seed=seed,
        metadata=SAEMetadata(**{name: value for name, value in atoms.cfg.metadata.to_dict().items() if name != "aip"}),
    )
    with torch.random.fork_rng(devices=[]):
        sae = DistilledTraining(config, atoms)
    sae.begin(x, atoms.aip, torch.Generator().manual_seed(seed))
    return Learner(sae)
