"""The report: what a dictionary is worth, train and held-out, against nulls of the same F and K (theory section 4)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.nulls import Pursuit, TrainedNull, data_atoms, random_atoms
from atom_lens.errors import AtomLensError
from atom_lens.evidence.bootstrap import FIGURES, intervals
from atom_lens.evidence.certify import certify
from atom_lens.evidence.measure import Observation, observe
from atom_lens.evidence.results import Angles, Excess, MetricAbout, Null, NullFigures, Report
from atom_lens.geometry import AtomicInnerProduct, angle_histogram, check_rows
from atom_lens.storage.versions import versions
from atom_lens.tensors.checks import Labels, checked_seed, labels
from atom_lens.tensors.rows import Rows, mean_row

_PERCENTS = (0.1, 1, 5, 25, 75, 95, 99, 99.9)
_ANGLE_ROWS = 5000
# A pursuit solves a k x k system per activation and step: beyond this a null takes longer than the atoms themselves.
_K_MOST = 64


@torch.no_grad()
def evaluate(
    atoms: Dictionary,
    x: Float[Tensor | Rows | np.ndarray, "n d"],
    heldout: Float[Tensor | Rows | np.ndarray, "m d"] | None = None,
    metric: AtomicInnerProduct | None = None,
    *,
    groups: Labels | None = None,
    trained_nulls: Mapping[str, TrainedNull] | None = None,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Report:
    """Measure `atoms` on the activations they were trained on, on held-out ones, and against nulls on both.

    Args:
        atoms: a TSAE, any sae-lens SAE, or anything with `W_dec`, `encode` and `decode`.
        x: training activations, shape (n, d).
        heldout: activations of other subjects, shape (m, d); without them the report's `heldout` is null.
        metric: the AIP; None takes the one that comes with the atoms.
        groups: subjects of the held-out rows, drawn whole by the bootstrap; None takes each row as a subject.
        trained_nulls: nulls with a training of their own, by name.
        seed: of the generators that draw the nulls and the bootstrap.
        about: further fields of the report (model, hook, ...).

    Returns:
        The content of report.json.

    Raises:
        AtomLensError: no metric, wrong widths, empty or non-finite activations, groups that do not fit, or a seed that
            is negative or above 2**63 - 1.
    """
    start = time.monotonic()
    if not (isinstance(atoms, Dictionary) and isinstance(atoms.W_dec, Tensor)):
        raise AtomLensError(f"atoms is of type {type(atoms).__name__}, expected a tensor W_dec, encode and decode")
    if not (metric is None or isinstance(metric, AtomicInnerProduct)):
        raise AtomLensError(f"metric is of type {type(metric).__name__}, expected an AtomicInnerProduct")
    given, metric = metric, metric if metric is not None else getattr(atoms, "aip", None)
    if metric is None or (given is None and metric.n == 0):  # n = 0 marks the identity of atoms that came without one
        raise AtomLensError("these atoms carry no metric: give one, AtomicInnerProduct.estimate(x)")
    given_splits = {"train": x} if heldout is None else {"train": x, "heldout": heldout}
    splits = {name: check_rows(rows, f"the {name} split", metric.width) for name, rows in given_splits.items()}
    x, seed = splits["train"], checked_seed(seed)
    if heldout is not None and groups is not None:
        groups = labels(groups, len(splits["heldout"]), "groups")
    device = atoms.W_dec.device  # where everything is measured, nulls included
    metric = metric.to(device)
    seen = {name: observe(atoms, rows, metric) for name, rows in splits.items()}
    figures = {name: one.figures for name, one in seen.items()}
    last = "train" if heldout is None else "heldout"
    if heldout is not None:
        found = intervals(seen[last], groups=groups, seed=seed)
        figures[last] = figures[last].model_copy(update={"interval": found})

    nulls: dict[str, Null] = {}
    mean = mean_row(x).to(device, torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for name, null in {
        "random": random_atoms(len(atoms.W_dec), metric, generator),
        "data": data_atoms(x, len(atoms.W_dec), mean, generator),
    }.items():
        measured = {}
        for split, rows in splits.items():
            # Matched K: a null uses as many atoms per activation as the dictionary does on average on this split.
            k = max(1, min(_K_MOST, round(figures[split].l0.mean), *null.shape))
            pursued = observe(Pursuit(null, mean, metric, k), rows, metric)
            # A null gets its best in either norm, so the R² of a Euclidean pursuit is reported too.
            best = dataclasses.replace(pursued, residual=Pursuit(null, mean, None, k).residual(rows))
            measured[split] = NullFigures(
                **dict(pursued.figures),
                r2_euclidean_pursuit=best.figures.r2,
                excess=_excess(seen[split], best, groups, seed) if split == "heldout" else None,
            )
        nulls[name] = Null(d_sae=len(null), **measured)
    for name, null in (trained_nulls or {}).items():
        measured = {}
        for split, rows in {"train": null.x, "heldout": null.heldout}.items():
            if split in splits:
                one = observe(null.atoms, rows, null.metric)
                excess = _excess(seen[split], one, groups, seed) if split == "heldout" else None
                measured[split] = NullFigures(**dict(one.figures), excess=excess)
        nulls[name] = Null(d_sae=len(null.atoms.W_dec), **measured)
    certificates = certify(atoms, splits[last], metric, seen[last], seed=seed)
    known = dict(about or {})
    seconds = known.pop("seconds", {})
    return Report(
        **known,
        n=len(x),
        d_in=metric.width,
        d_sae=len(atoms.W_dec),
        n_over_f=len(x) / len(atoms.W_dec),
        metric=MetricAbout(n=metric.n, ridge=metric.ridge, condition=metric.condition, source=metric.source),
        angles=angles(x, metric),
        train=figures["train"],
        heldout=figures.get("heldout"),
        certificates=certificates.model_copy(update={"split": last}),
        nulls=nulls,
        seconds={**seconds, "evaluate": time.monotonic() - start},
        versions=versions(),
    )


def _excess(seen: Observation, null: Observation, groups: Labels | None, seed: int) -> dict[str, Excess]:
    """How far the atoms are above a null on the same subjects, with 95% intervals."""
    found = intervals(seen, null, groups, seed)
    return {name: Excess(value=seen.figures[name] - null.figures[name], interval=found[name]) for name in FIGURES}


def angles(x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct) -> dict[str, Angles]:
    """Angles between activations in degrees, Euclidean and under `metric`: mean and percentiles, up to 5,000 rows."""
    rows = x[torch.linspace(0, len(x) - 1, min(len(x), _ANGLE_ROWS)).long()].to(metric.eigenvalues.device)
    rows = rows[rows.norm(dim=1) > 0]  # zero has no direction
    found = {"euclidean": angle_histogram(rows), "aip": angle_histogram(rows, metric)}
    return {
        name: Angles(
            mean=one.mean,
            median=one.median,
            percentiles={f"{percent:g}": one.quantile(percent / 100) for percent in _PERCENTS},
        )
        for name, one in found.items()
    }
