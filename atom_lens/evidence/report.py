"""The report: what a dictionary is worth, train and held-out, beside nulls of the same F and K (theory section 4)."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atom_lens.evidence.faithfulness import Residuals
from atom_lens.evidence.measure import Dictionary, measure
from atom_lens.evidence.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.geometry import AtomicInnerProduct, angle_histogram, check_rows

SCHEMA_VERSION = 1
_ANGLE_ROWS = 5000
# A pursuit solves a k x k system per activation and step: beyond this a null takes longer than what it stands beside.
_K_MOST = 64


def evaluate(
    atoms: Dictionary,
    x: Float[Tensor, "n d"],
    heldout: Float[Tensor, "m d"] | None = None,
    metric: AtomicInnerProduct | None = None,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure `atoms` on the activations they were trained on, on held-out ones, and against nulls on both.

    Args:
        atoms: a TSAE, any sae-lens SAE, or anything with `W_dec`, `encode` and `decode`.
        x: training activations, shape (n, d).
        heldout: activations of other subjects, shape (m, d); without them the report's `heldout` is null.
        metric: the AIP; None takes the one that comes with the atoms.
        seed: of the generator that draws the nulls.
        about: further fields of the report (model, hook, ...).

    Returns:
        report.json as a dict (docs/report.md).

    Raises:
        ValueError: no metric, wrong widths, empty or non-finite activations.
    """
    start = time.monotonic()
    metric = metric if metric is not None else getattr(atoms, "aip", None)
    if metric is None:
        raise ValueError("these atoms carry no metric: give one, AtomicInnerProduct.estimate(x)")
    metric = metric.to(x.device)
    splits = {"train": x} if heldout is None else {"train": x, "heldout": heldout}
    for name, rows in splits.items():
        check_rows(rows, f"the {name} split", metric.width)
    figures = {name: measure(atoms, rows, metric) for name, rows in splits.items()}
    n_atoms = len(atoms.W_dec)

    # Matched K: a null spends as many atoms on an activation as the atoms do on average.
    k = max(1, min(_K_MOST, round(figures["train"]["l0"]["mean"])))
    mean = x.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    dictionaries = {
        "random": random_atoms(n_atoms, metric, generator),
        "data": data_atoms(x, n_atoms, mean, generator),
    }
    nulls = {}
    for name, null in dictionaries.items():
        k_null = min(k, *null.shape)
        nulls[name] = {"k": k_null, "d_sae": len(null)}
        for split, rows in splits.items():
            nulls[name][split] = measure(Pursuit(null, mean, metric, k_null), rows, metric)
            # A null gets its best in either norm, so the Euclidean R² of a Euclidean pursuit stands beside.
            euclidean, sums = Pursuit(null, mean, None, k_null), Residuals(metric.width)
            for chunk in rows.split(1024):
                sums.update(chunk, euclidean.decode(euclidean.encode(chunk)))
            nulls[name][split]["r2_euclidean_pursuit"] = sums.r2
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
        "nulls": nulls,
        "versions": versions(),
    }
    report["seconds"] = {**report.get("seconds", {}), "evaluate": time.monotonic() - start}
    return report


def angles(x: Float[Tensor, "n d"], metric: AtomicInnerProduct) -> dict[str, dict[str, float]]:
    """Mean and median angle between activations in degrees, Euclidean and under `metric`, over up to 5,000 rows."""
    rows = x[torch.linspace(0, len(x) - 1, min(len(x), _ANGLE_ROWS)).long()]
    found = {"euclidean": angle_histogram(rows), "aip": angle_histogram(rows, metric)}
    return {name: {"mean": histogram.mean, "median": histogram.median} for name, histogram in found.items()}


def versions() -> dict[str, str]:
    """Versions of everything that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in ("atom-lens", "torch", "sae-lens", "transformer-lens", "nnsight", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report as a person reads it: train and held-out, beside each null on the same two splits."""
    columns = {"atoms": report, **{f"{name} null": null for name, null in report["nulls"].items()}}
    splits = [split for split in ("train", "heldout") if report.get(split)]
    rows = {
        "R²": lambda f: f"{f.get('r2_euclidean_pursuit', f['r2']):.4f}",
        "R² (AIP)": lambda f: f"{f['r2_aip']:.4f}",
        "q*": lambda f: f"{f['q_star']:.4f}",
        "L0 mean": lambda f: f"{f['l0']['mean']:.2f}",
        "L0 99.8%": lambda f: f"{f['l0']['p998']}",
        "empty codes": lambda f: f"{f['empty_codes']:.1%}",
        "dead atoms": lambda f: f"{f['dead_atoms']}",
        "coherence 99.8%": lambda f: f"{f['coherence']['p998']:.3f}",
    }
    cells = [["", *(name if split == splits[0] else "" for name in columns for split in splits)]]
    cells.append(["", *(split.replace("heldout", "held-out") for _ in columns for split in splits)])
    for label, show in rows.items():
        cells.append([label, *(show(column[split]) for column in columns.values() for split in splits)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(2, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def reading(report: Mapping[str, Any]) -> str:
    """One sentence on what n / F means for the train column."""
    ratio, n, f = report["n_over_f"], report["n"], report["d_sae"]
    head = f"n / F = {ratio:.2f}: {n} activations for {f} atoms"
    null = report["nulls"]["data"]["train"]["r2_euclidean_pursuit"]
    if ratio <= 1:
        return (
            f"{head}, so each activation can have an atom of its own: the train column shows what can be memorised "
            f"(bare data points reach R² {null:.4f} there), only the held-out column shows what was learned."
        )
    if ratio < 8:
        return (
            f"{head}, so an atom can serve a few activations only and the train column is mostly in-sample fit: "
            "read the held-out column, and its distance from the data null."
        )
    return f"{head}, too many to be memorised one by one: still, read the held-out column against the data null."
