"""The report: what a dictionary is worth, train and held-out, beside nulls of the same F and K (theory section 4)."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.dictionaries import Dictionary
from atom_lens.dictionaries.nulls import Pursuit, TrainedNull, data_atoms, random_atoms
from atom_lens.evidence.bootstrap import FIGURES, intervals
from atom_lens.evidence.certify import certify
from atom_lens.evidence.faithfulness import explained
from atom_lens.evidence.measure import Observation, observe
from atom_lens.geometry import AtomicInnerProduct, angle_histogram, check_rows
from atom_lens.tensors.checks import Labels, checked_seed, labels
from atom_lens.tensors.rows import Rows, mean_row

SCHEMA_VERSION = 2
_PERCENTS = (0.1, 1, 5, 25, 75, 95, 99, 99.9)
_ANGLE_ROWS = 5000
# A pursuit solves a k x k system per activation and step: beyond this a null takes longer than what it stands beside.
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
) -> dict[str, Any]:
    """Measure `atoms` on the activations they were trained on, on held-out ones, and against nulls on both.

    Args:
        atoms: a TSAE, any sae-lens SAE, or anything with `W_dec`, `encode` and `decode`.
        x: training activations, shape (n, d).
        heldout: activations of other subjects, shape (m, d); without them the report's `heldout` is null.
        metric: the AIP; None takes the one that comes with the atoms.
        groups: subjects of the held-out rows, drawn whole by the bootstrap; None takes each row as a subject.
        trained_nulls: nulls that took a training of their own, by name.
        seed: of the generators that draw the nulls and the bootstrap.
        about: further fields of the report (model, hook, ...).

    Returns:
        report.json as a dict (docs/report.md).

    Raises:
        ValueError: no metric, wrong widths, empty or non-finite activations, groups that do not fit, or a seed that is
            negative or above 2**63 - 1.
    """
    start = time.monotonic()
    if not (isinstance(atoms, Dictionary) and isinstance(atoms.W_dec, Tensor)):
        raise ValueError(f"atoms is of type {type(atoms).__name__}, expected a tensor W_dec, encode and decode")
    if not (metric is None or isinstance(metric, AtomicInnerProduct)):
        raise ValueError(f"metric is of type {type(metric).__name__}, expected an AtomicInnerProduct")
    given, metric = metric, metric if metric is not None else getattr(atoms, "aip", None)
    if metric is None or (given is None and metric.n == 0):  # n = 0 marks the identity of atoms that came without one
        raise ValueError("these atoms carry no metric: give one, AtomicInnerProduct.estimate(x)")
    given_splits = {"train": x} if heldout is None else {"train": x, "heldout": heldout}
    splits = {name: check_rows(rows, f"the {name} split", metric.width) for name, rows in given_splits.items()}
    x, seed = splits["train"], checked_seed(seed)
    if heldout is not None and groups is not None:
        groups = labels(groups, len(splits["heldout"]), "groups")
    device = atoms.W_dec.device  # where all is measured, the nulls too
    metric = metric.to(device)
    seen = {name: observe(atoms, rows, metric) for name, rows in splits.items()}
    figures = {name: dict(one.figures) for name, one in seen.items()}
    n_atoms = len(atoms.W_dec)
    last = "train" if heldout is None else "heldout"
    if heldout is not None:
        figures[last]["interval"] = intervals(seen[last], groups=groups, seed=seed)

    mean = mean_row(x).to(device, torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        "random": random_atoms(n_atoms, metric, generator),
        "data": data_atoms(x, n_atoms, mean, generator),
    }
    nulls: dict[str, Any] = {}
    for name, null in drawn.items():
        nulls[name] = {"d_sae": len(null)}
        for split, rows in splits.items():
            # Matched K: a null spends as many atoms on an activation as the atoms do on average on this split.
            k = max(1, min(_K_MOST, round(figures[split]["l0"]["mean"]), *null.shape))
            pursued = observe(Pursuit(null, mean, metric, k), rows, metric)
            # A null gets its best in either norm, so the Euclidean R² of a Euclidean pursuit stands beside.
            residual = Pursuit(null, mean, None, k).residual(rows)
            nulls[name][split] = {**pursued.figures, "r2_euclidean_pursuit": explained(residual, pursued.total)}
            if split == "heldout":
                best = dataclasses.replace(pursued, residual=residual)
                nulls[name][split]["excess"] = _excess(seen[split], best, groups, seed)
    for name, null in (trained_nulls or {}).items():
        nulls[name] = {"d_sae": len(null.atoms.W_dec)}
        for split, rows in {"train": null.x, "heldout": null.heldout}.items():
            if split in splits:
                one = observe(null.atoms, rows, null.metric)
                nulls[name][split] = dict(one.figures)
                if split == "heldout":
                    nulls[name][split]["excess"] = _excess(seen[split], one, groups, seed)
    report = {
        "schema_version": SCHEMA_VERSION,
        **(about or {}),
        "n": len(x),
        "d_in": metric.width,
        "d_sae": n_atoms,
        "n_over_f": len(x) / n_atoms,
        "metric": {
            "n": metric.n,
            "ridge": metric.ridge,
            "condition": metric.condition,
            "source": metric.source,
        },
        "angles": angles(x, metric),
        "train": figures["train"],
        "heldout": figures.get("heldout"),
        "certificates": {"split": last, **certify(atoms, splits[last], metric, seen[last], seed=seed)},
        "nulls": nulls,
        "versions": versions(),
    }
    report["seconds"] = {**report.get("seconds", {}), "evaluate": time.monotonic() - start}
    return report


def _excess(
    seen: Observation, null: Observation, groups: Labels | None, seed: int
) -> dict[str, dict[str, float | list[float]]]:
    """How far the atoms are above a null on the same subjects, with 95% intervals."""
    every = torch.arange(len(seen))
    found = intervals(seen, null, groups, seed)
    return {
        name: {"value": figure(seen, every) - figure(null, every), "interval": found[name]}
        for name, figure in FIGURES.items()
    }


def angles(x: Float[Tensor | Rows, "n d"], metric: AtomicInnerProduct) -> dict[str, dict[str, Any]]:
    """Angles between activations in degrees, Euclidean and under `metric`: mean, percentiles, over up to 5,000 rows."""
    rows = x[torch.linspace(0, len(x) - 1, min(len(x), _ANGLE_ROWS)).long()].to(metric.eigenvalues.device)
    rows = rows[rows.norm(dim=1) > 0]  # zero has no direction
    found = {"euclidean": angle_histogram(rows), "aip": angle_histogram(rows, metric)}
    return {
        name: {
            "mean": one.mean,
            "median": one.median,
            "percentiles": {f"{percent:g}": one.quantile(percent / 100) for percent in _PERCENTS},
        }
        for name, one in found.items()
    }


def versions() -> dict[str, str]:
    """Versions of everything that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in ("atom-lens", "torch", "sae-lens", "transformer-lens", "nnsight", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
