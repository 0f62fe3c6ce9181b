"""Fit: atoms from your own activations, and a report on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries import recipes_kind
from atom_lens.dictionaries.metered import Metered
from atom_lens.errors import AtomLensError
from atom_lens.evidence.report import evaluate
from atom_lens.evidence.results import Report
from atom_lens.geometry import AtomicInnerProduct, check_rows
from atom_lens.recipe.reading import checked
from atom_lens.recipe.sections import Architecture, Atoms, Training
from atom_lens.recipe.split import heldout_rows
from atom_lens.studies.train.show import report_table
from atom_lens.tensors.checks import Labels, labels
from atom_lens.tensors.rows import Rows, float32_rows
from atom_lens.training.fit import fit_one


class Fitted(NamedTuple):
    """Atoms on raw activations, with their metric, and the report on held-out rows."""

    atoms: Metered
    report: Report

    def __str__(self) -> str:
        return report_table(self.report).text()


def fit(
    x: Float[Tensor | Rows | np.ndarray, "n d"],
    *,
    groups: Labels | None = None,
    architecture: Architecture = "aip_pursuit",
    d_sae: int | None = None,
    target_l0: float = 8.0,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 3e-3,
    device: str = "auto",
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    **others: Any,
) -> Fitted:
    """Train atoms on activations `x`, shape (n, d), and measure them: a fifth is held out, and a tenth of the rest
    sets the threshold.

    Args:
        x: a tensor, a numpy array or memory map, of any floating-point type; it is read in batches.
        groups: the subject or document of every row, which is never on two sides. None takes each row as its own.
        architecture: atoms under a pursuit, TopK in the AIP, or a threshold SAE.
        d_sae: number of atoms; None takes four times the width, and no more than one for every ten training rows.
        target_l0: number of active atoms per activation; exact for TopK, an average for others.
        steps: of the training.
        batch_size: rows of a step.
        lr: the highest learning rate.
        device: where it trains.
        seed: of the split, the start, the order of the rows and the nulls.
        metadata: of the sae-lens config: `model_name`, `hook_name`, ...
        others: further keys of the section `atoms` of a recipe.

    Raises:
        AtomLensError: rows that are not a finite matrix, too few rows, groups that do not fit, or a key or value that
            is not allowed.
    """
    given = check_rows(x, "x")
    subjects = labels(range(len(given)) if groups is None else groups, len(given), "groups")
    out = heldout_rows(subjects, 0.2, seed)
    rest = (~out).nonzero()[:, 0]
    aside = torch.zeros_like(out)
    aside[rest[heldout_rows([subjects[i] for i in rest.tolist()], 0.1, seed)]] = True
    rows = float32_rows(given)
    train, heldout, calibration = (rows.select(which) for which in (~out & ~aside, out, aside))
    if len(train) < 2 or len(heldout) < 2:
        raise AtomLensError(f"x has {len(given)} rows, of which {len(train)} are left for training: give more")
    asked = {
        "architecture": architecture,
        "capacity": d_sae if d_sae is not None else max(1, min(4 * given.shape[1], len(train) // 10)),
        "target_l0": target_l0,
        **others,
    }
    atoms = checked(Atoms, asked, "atoms")
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "device": device, "seed": seed}
    training = checked(Training, settings, "training")
    aip = AtomicInnerProduct.estimate(train, source=f"{len(train)} given activations")
    found, _ = fit_one(train, aip, atoms, training, metadata, calibration=calibration)
    kept = [subjects[i] for i in out.nonzero()[:, 0].tolist()]
    about = {"kind": recipes_kind(atoms).name}
    return Fitted(found, evaluate(found.cpu(), train, heldout, groups=kept, seed=seed, about=about))
