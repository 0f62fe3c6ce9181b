"""Seconds of a training step: sae-lens' JumpReLU trainer, our dense and sparse steps, and the encoder's product alone.

    python benchmarks/training_step.py --json training_step.json

All trainers are sae-lens' own; steps are interleaved in one run, each on the same batch; medians, with the quartiles.
Compare ratios, not seconds: the machine may be doing something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from atom_lens import AtomicInnerProduct, TSAETraining, TSAETrainingConfig

SIZES = [(640, 2560), (640, 10240), (2304, 9216)]


def trainer(sae: Any, batch: int, device: str) -> SAETrainer[Any, Any]:
    settings = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=batch,
        lr=1e-4,
        lr_end=1e-5,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae.to(device), iter(()))


def contestants(d: int, f: int, batch: int, l0: float, encoder: Any, device: str) -> dict[str, Callable[[], Any]]:
    """Name -> one step on the same batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * batch, d, generator=generator)
    aip = AtomicInnerProduct.estimate(x)
    made: dict[str, Callable[[], Any]] = {}
    rows = x[:batch].to(device)
    stock = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=d, d_sae=f, jumprelu_sparsity_loss_mode="quadratic", target_l0=l0)
    )
    one = trainer(stock, batch, device)
    made["sae-lens JumpReLU"] = lambda: one.step(rows)
    for step in ("dense", "sparse"):
        config = TSAETrainingConfig(d_in=d, d_sae=f, target_l0=l0, encoder=encoder, step=step, device=device)
        sae = TSAETraining(config)
        y = (x.double() @ sae.whitening(aip).matrix).float()
        sae.prepare(y, aip, torch.Generator().manual_seed(0))
        ours, batch_rows = trainer(sae, batch, device), y[:batch].to(device)
        made[f"TSAE, {step}"] = lambda ours=ours, batch_rows=batch_rows: ours.step(batch_rows)
    weights = torch.randn(d, f, device=device)
    made["encoder product alone"] = lambda: rows @ weights
    return made


def measure(d: int, f: int, batch: int, l0: float, encoder: str, rounds: int, device: str) -> dict[str, Any]:
    """Seconds per step of each, interleaved."""
    steps = contestants(d, f, batch, l0, encoder, device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    found_l0: dict[str, float] = {}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            output = step()
            if device != "cpu":
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
            if hasattr(output, "feature_acts"):
                found_l0[name] = float((output.feature_acts.to_dense() != 0).sum()) / batch
    base = statistics.median(seconds["sae-lens JumpReLU"])
    rows = {
        name: {
            "median_s": statistics.median(values),
            "quartiles_s": statistics.quantiles(values, n=4)[::2],
            "activations_per_s": batch / statistics.median(values),
            "times_sae_lens": base / statistics.median(values),
            "l0_at_the_end": found_l0.get(name),
        }
        for name, values in seconds.items()
    }
    about = {"d": d, "F": f, "batch": batch, "target_l0": l0, "encoder": encoder, "rounds": rounds, "device": device}
    return {**about, "threads": torch.get_num_threads(), "torch": torch.__version__, "steps": rows}


def table(found: list[dict[str, Any]]) -> str:
    lines = []
    for one in found:
        lines.append(
            f"d = {one['d']}, F = {one['F']}, batch {one['batch']}, L0 {one['target_l0']:g}, {one['encoder']} encoder, "
            f"{one['threads']} threads, {one['rounds']} rounds"
        )
        for name, row in one["steps"].items():
            low, high = row["quartiles_s"]
            l0 = "" if row["l0_at_the_end"] is None else f"   L0 {row['l0_at_the_end']:.1f}"
            lines.append(
                f"  {name:24} {1e3 * row['median_s']:8.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})"
                f"  {row['activations_per_s']:9,.0f} activations/s  {row['times_sae_lens']:5.2f} x{l0}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--l0", type=float, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="free", choices=["free", "tied"])
    parser.add_argument("--sizes", default=",".join(f"{d}x{f}" for d, f in SIZES), help="d x F, e.g. 640x2560")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes.split(","):
        width, capacity = map(int, size.split("x"))
        results.append(
            measure(
                width,
                capacity,
                arguments.batch,
                arguments.l0,
                arguments.encoder,
                arguments.rounds,
                arguments.device,
            )
        )
        print(table(results[-1:]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
