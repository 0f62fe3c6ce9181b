"""The report in words and tables: what a person reads in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from atom_lens.storage.files import visible

_ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "R²": lambda f: f"{f.get('r2_euclidean_pursuit', f['r2']):.4f}",
    "R² (AIP)": lambda f: f"{f['r2_aip']:.4f}",
    "q*": lambda f: f"{f['q_star']:.4f}",
    "L0 mean": lambda f: f"{f['l0']['mean']:.2f}",
    "L0 99.8%": lambda f: f"{f['l0']['p998']}",
    "empty codes": lambda f: f"{f['empty_codes']:.1%}",
    "dead atoms": lambda f: f"{f['dead_atoms']}",
    "coherence 99.8%": lambda f: f"{f['coherence']['p998']:.3f}",
}
_NAMES = {"r2": "R²", "r2_aip": "R² (AIP)", "q_star": "q*"}


def aligned(cells: Sequence[Sequence[str]], heads: int = 1) -> str:
    """A table: first column to the left, the others to the right, a rule under the first `heads` rows.

    Chinese, say, takes two places of a terminal for a character.
    """
    shown = [[visible(cell) for cell in row] for row in cells]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        first, *others = zip(row, blanks, strict=True)
        lines.append("  ".join([first[0] + first[1], *(blank + cell for cell, blank in others)]).rstrip())
    lines.insert(heads, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def table(report: Mapping[str, Any]) -> str:
    """Train and held-out, beside each null on the same two splits; then how far above each null the atoms are."""
    columns = {"atoms": report, **{f"{name} null": null for name, null in report["nulls"].items()}}
    splits = [split for split in ("train", "heldout") if report.get(split)]
    cells = [["", *(name if split == splits[0] else "" for name in columns for split in splits)]]
    cells.append(["", *(split.replace("heldout", "held-out") for _ in columns for split in splits)])
    for label, show in _ROWS.items():
        cells.append([label, *(show(column[split]) for column in columns.values() for split in splits)])
    blocks = [aligned(cells, heads=2)]
    if report.get("heldout"):
        heads = ["held-out, 95% interval", "atoms", *(f"above {name}" for name in report["nulls"])]
        cells = [heads]
        for key, label in _NAMES.items():
            low, high = report["heldout"]["interval"][key]
            excess = (null["heldout"]["excess"][key]["interval"] for null in report["nulls"].values())
            cells.append([label, f"{low:.3f} to {high:.3f}", *(f"{a:+.3f} to {b:+.3f}" for a, b in excess)])
        blocks.append(aligned(cells))
    return "\n\n".join(blocks)


def certificates_text(report: Mapping[str, Any]) -> str:
    """What is proved about these atoms and codes, and what other runs say of them: a line each."""
    found = report["certificates"]
    where = "held-out" if found["split"] == "heldout" else "training"
    if found["rip"] is None:
        return f"certificates ({where} codes): none, no atom is alive"
    rip, codes, recovery, window = found["rip"], found["codes"], found["recovery"], found["window"]
    lines = [
        f"RIP bound (K - 1) mu at the largest K = {rip['k']}: {rip['bound']:.2f}, a proof only below 1",
        f"atoms that are unique for every code they are in: {_percent(found['unique_atoms'])}",
        f"codes certified by their own support: {_percent(codes['exact_recovery'])} (exact recovery condition), "
        f"{_percent(codes['babel'])} (Babel function), of {codes['n']}",
    ]
    if recovery:
        omp, bp, real = (recovery[k] for k in ("omp_reconstruction", "bp_reconstruction", "omp_activation"))
        lines.append(
            f"same support found from the reconstruction: {_percent(omp['same_support'])} by matching pursuit, "
            f"{_percent(bp['same_support'])} by basis pursuit; from the activation {_percent(real['same_support'])}, "
            f"sharing {_percent(real['shared_atoms'])} of the atoms"
        )
    if window:
        lines.append(
            f"thresholds inside the window of the identifiability theorem: {_percent(window['inside'])} "
            f"(it is open for {_percent(window['feasible'])} of the atoms)"
        )
    text = "\n".join([f"certificates ({where} codes)", *(f"  {line}" for line in lines)])
    if same := report.get("identity"):
        text += (
            f"\nidentity over {same['runs']} runs\n"
            f"  PW-MCC {same['pw_mcc']:.3f} ({same['pw_mcc_start']:.3f} before training), "
            f"{_percent(same['above_09'])} of the atoms above 0.9, "
            f"{_percent(same['above_level'])} above the best random match ({same['level']:.3f})"
        )
    return text


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def reading(report: Mapping[str, Any]) -> str:
    """In a few sentences, which figures of this report are no evidence, and which are."""
    ratio, n, f = report["n_over_f"], report["n"], report["d_sae"]
    text = f"n / F = {ratio:.2f}: {n} activations for {f} atoms"
    null = report["nulls"]["data"]["train"]["r2_euclidean_pursuit"]
    if ratio <= 1:
        text += (
            ", so each activation can have an atom of its own: the train column shows what can be memorised (bare data "
            f"points reach R² {null:.4f} there), only the held-out column shows what was learned."
        )
    elif ratio < 8:
        text += (
            ", so an atom can serve a few activations only and the train column is mostly in-sample fit: read the "
            "held-out column, and its distance from the data null."
        )
    else:
        text += ", too many to be memorised one by one: still, read the held-out column against the data null."
    random = report["nulls"]["random"]["train"]
    if random["q_star"] >= 0.998:
        text += (
            f" Random directions reach q* {random['q_star']:.4f} at this L0, so q* is no evidence here: it only says "
            "that few atoms were active."
        )
    return text
