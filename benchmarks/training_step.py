"""Seconds of a training step of sae-lens, sparsify, dictionary_learning, overcomplete and ours, and the R² they reach.

    python benchmarks/training_step.py --json training_step.json

All train in one process, in turns: a step each on the same raw rows, then the next batch; float32, Adam. A step is what
the library's own trainer does, including scaling or whitening of the rows, at its defaults except for the learning rate
and its warm-up, which are the same for all: a benchmark ends before the usual 1,000 steps of warm-up. Seconds are those
of steps, without estimates made before the first; compare ratios, the machine may be doing something else. R² is that
of raw held-out rows after the same number of steps, shown with its L0: thresholds learned from a random start take
longer than a benchmark to bring it down to the target. The last column has the seconds until that R² was first above
`--reach` at no more than one and a half times the target L0, counted in median steps.

Peers: `pip install 'atom-lens[bench]'`, and `pip install --no-deps dictionary-learning overcomplete`, whose own
dependencies do not fit or are more than is used here; those that are missing are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.nn.functional import embedding_bag, mse_loss, normalize

from atom_lens import (
    AtomicInnerProduct,
    PursuitTraining,
    PursuitTrainingConfig,
    TSAETraining,
    TSAETrainingConfig,
    harvest,
)
from atom_lens.activations.prompts.cities import Cities
from atom_lens.dictionaries.baselines.stock import stock_sae
from atom_lens.dictionaries.learning import Learning
from atom_lens.training.faster import fuse

SIZES = "640x2560,640x10240,2304x9216"
MODEL, HOOK, MODEL_WIDTH = "demo:gemma-3-270m", "blocks.9.hook_resid_post", 640
HELDOUT = 1000
BASE, FLOOR = "sae-lens JumpReLU", "encoder product alone"
DENSE, CONTROL = "TSAE, dense", "TSAE, dense, a bit off"
LIBRARIES = ["torch", "sae-lens", "eai-sparsify", "dictionary-learning", "overcomplete"]


@dataclass(frozen=True)
class Setup:
    """The settings of all contestants."""

    d: int
    f: int
    rows: Tensor
    heldout: Tensor
    batch: int
    l0: float
    lr: float
    encoder: str
    device: str
    warm_up: int
    rounds: int
    every: int
    control: bool
    reach: float


@dataclass
class Contestant:
    """`step` learns from raw rows; `read` gives the number of active latents of each, and the rows reconstructed."""

    step: Callable[[Tensor], Any]
    read: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    trainer: Any = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


def activations(kind: str, d: int, n: int = 16_000) -> tuple[Tensor, str]:
    """Raw rows, shape (n, d), shuffled, and what they are: planted ones where no model of that width is at hand.

    Planted means: 16 of 2 d directions with non-negative codes, about a mean as far out as in the demo model.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "cities" or (kind == "auto" and d == MODEL_WIDTH):
        x, about = harvest(MODEL, Cities(limit=n).read(), HOOK, unique=True)[HOOK], f"cities, {MODEL}, {HOOK}"
        if x.shape[1] != d:
            raise SystemExit(f"--data is 'cities' with d = {d}, allowed is d = {x.shape[1]}")
    elif kind == "gaussian":
        x, about = torch.randn(n, d, generator=generator), "Gaussian"
    else:
        atoms = normalize(torch.randn(2 * d, d, generator=generator))
        index = torch.rand(n, 2 * d, generator=generator).topk(16).indices
        codes = torch.rand(n, 16, generator=generator) + 0.5
        x = embedding_bag(index, atoms, per_sample_weights=codes, mode="sum")
        x = x + 25 * normalize(torch.randn(d, generator=generator), dim=0)
        x = x + 0.5 / d**0.5 * torch.randn(n, d, generator=generator)
        about = f"planted: 16 of {2 * d:,} random directions with non-negative codes, a common mean, 1.4% noise"
    return x[torch.randperm(len(x), generator=generator)].contiguous(), f"{len(x):,} rows, {about}"


def by_sae_lens(setup: Setup, sae: Any) -> Contestant:
    """Steps of sae-lens' trainer, with what its `fit` estimates before the first: a scale, or a whitening."""
    # lr_end is of schedules that are not used, but it may not be None.
    settings = SAETrainerConfig(10**9, setup.batch, lr=setup.lr, lr_end=setup.lr / 10, device=setup.device)
    trainer = SAETrainer(settings, sae.to(setup.device), iter(()))
    scaler, chunks = trainer.activation_scaler, setup.rows.split(setup.batch)
    if isinstance(sae, Learning):
        pass  # ours whiten by themselves
    elif sae.cfg.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(setup.d, iter(chunks), len(chunks))
    else:
        scaler.estimate_scaling_factor(setup.d, iter(chunks), len(chunks))

    def step(x: Tensor) -> Any:
        output = trainer.step(x)
        trainer.n_training_steps += 1
        return output

    def read(x: Tensor) -> tuple[Tensor, Tensor]:
        sae.eval()
        if isinstance(sae, Learning):
            sae.project()  # as the next step would, or the end of the training
        codes = sae.encode(scaler(x))
        return (codes.to_dense() != 0).sum(1), scaler.unscale(sae.decode(codes))

    return Contestant(step, read, trainer)


def of_sae_lens(setup: Setup) -> Iterator[tuple[str, Contestant]]:
    d, f, k, device = setup.d, setup.f, round(setup.l0), setup.device
    yield BASE, by_sae_lens(setup, stock_sae("jumprelu", setup.l0, d, f, False, device, 0))
    yield f"{BASE}, whitened", by_sae_lens(setup, stock_sae("jumprelu", setup.l0, d, f, True, device, 0))
    yield "sae-lens TopK", by_sae_lens(setup, stock_sae("topk", k, d, f, False, device, 0))
    # With sparse codes the backward pass of its default, rescaling by decoder norms, is not implemented in torch.
    options: dict[str, Any] = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    options |= {"normalize_activations": "expected_average_only_in", "device": device}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k, **options))
    yield "sae-lens TopK, sparse codes", by_sae_lens(setup, sae)
    yield "sae-lens matching pursuit", by_sae_lens(setup, stock_sae("matching_pursuit", k, d, f, False, device, 0))


def of_ours(setup: Setup) -> Iterator[tuple[str, Contestant]]:
    """All start alike and draw the same noise; Adam goes over the weights once, as in `atom_lens.training.fit`."""
    aip = AtomicInnerProduct.estimate(setup.rows)
    variants: dict[str, dict[str, Any]] = {DENSE: {"step": "dense"}}
    if setup.control:
        variants[CONTROL] = {"step": "dense"}
    variants["TSAE, sparse"] = {"step": "sparse"}
    variants["TSAE, sparse, bfloat16"] = {"step": "sparse", "encoder_product": "bfloat16"}
    for name, options in variants.items():
        options = {"encoder": setup.encoder, "device": setup.device, **options}
        sae = TSAETraining(TSAETrainingConfig(d_in=setup.d, d_sae=setup.f, target_l0=setup.l0, **options))
        sae.begin(setup.rows, aip, torch.Generator().manual_seed(0))
        if name == CONTROL:
            sae.b_dec.data.mul_(1 + 2**-23)
        one = by_sae_lens(setup, sae)
        fuse(one.trainer)
        yield name, one
    sizes: dict[str, Any] = {"d_in": setup.d, "d_sae": setup.f, "k": setup.l0, "max_iterations": round(2 * setup.l0)}
    pursuit = PursuitTraining(PursuitTrainingConfig(**sizes, amortised_steps=0, device=setup.device))
    pursuit.begin(setup.rows, aip, torch.Generator().manual_seed(0))
    one = by_sae_lens(setup, pursuit)
    fuse(one.trainer)
    yield "pursuit", one


def of_sparsify(setup: Setup) -> Iterator[tuple[str, Contestant]]:
    """What its trainer does at a hook for the loss `fvu`, with the optimizer `adam`. It scales no rows."""
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=setup.f, k=round(setup.l0))
    coder = SparseCoder(setup.d, config, setup.device, torch.float32)
    coder.b_dec.data = setup.rows[: setup.batch].mean(0).to(setup.device)  # its first step does that
    optimizer = torch.optim.Adam(coder.parameters(), lr=setup.lr)
    unfired = torch.zeros(setup.f, dtype=torch.long, device=setup.device)

    def step(x: Tensor) -> Any:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, y=x, total_variance=(x - x.mean(0)).square().sum())
        out.fvu.backward()  # AuxK and Multi-TopK are off by default
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        unfired.add_(len(x))[out.latent_indices.flatten()] = 0

    def read(x: Tensor) -> tuple[Tensor, Tensor]:
        out = coder(x)
        return (out.latent_acts != 0).sum(1), out.sae_out

    yield "sparsify TopK", Contestant(step, read)


def of_dictionary_learning(setup: Setup) -> Iterator[tuple[str, Contestant]]:
    """Rows have mean square norm 1, as with `trainSAE(normalize_activations=True)`: its thresholds start at 0.001."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    shared: dict[str, Any] = {"activation_dim": setup.d, "dict_size": setup.f, "layer": 0, "lm_name": MODEL}
    shared |= {"steps": 10**9, "warmup_steps": 0, "lr": setup.lr, "device": setup.device}
    unit = float(setup.rows.square().sum(1).mean().sqrt())

    def contestant(trainer: Any) -> Contestant:
        numbers = iter(range(10**9))

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            out, codes = trainer.ae(x / unit, output_features=True)
            return (codes != 0).sum(1), out * unit

        return Contestant(lambda x: trainer.update(next(numbers), x / unit), read)

    jumprelu = JumpReluTrainer(**shared, target_l0=setup.l0, sparsity_warmup_steps=0)
    yield "dictionary_learning JumpReLU", contestant(jumprelu)
    yield "dictionary_learning TopK", contestant(TopKTrainer(**shared, k=round(setup.l0)))


def of_overcomplete(setup: Setup) -> Iterator[tuple[str, Contestant]]:
    """The loop of its README, with its log off. It has no decoder bias: rows are standardized."""
    package = find_spec("overcomplete")
    if package is None:
        raise ImportError("No module named 'overcomplete'")
    # Its __init__ imports vision models, and with them torchvision and OpenCV, which its SAEs do without.
    sys.modules.setdefault("overcomplete", module_from_spec(package))
    library = importlib.import_module("overcomplete.sae")
    mean = setup.rows.mean(0).to(setup.device)
    std = float((setup.rows - setup.rows.mean(0)).square().mean().sqrt())

    def loss(x: Tensor, out: Tensor, *_: Tensor) -> Tensor:
        return mse_loss(out, x)

    def contestant(sae: Any) -> Contestant:
        optimizer = torch.optim.Adam(sae.parameters(), lr=setup.lr)

        def step(x: Tensor) -> Any:
            batches = [(x - mean) / std]
            library.train_sae(sae, batches, loss, optimizer, nb_epochs=1, monitoring=0, device=setup.device)

        def read(x: Tensor) -> tuple[Tensor, Tensor]:
            _, codes, out = sae.eval()((x - mean) / std)
            return (codes != 0).sum(1), out * std + mean

        return Contestant(step, read)

    k, shared = round(setup.l0), {"nb_concepts": setup.f, "device": setup.device}
    yield "overcomplete TopK", contestant(library.TopKSAE(setup.d, top_k=k, **shared))
    yield "overcomplete OMP", contestant(library.OMPSAE(setup.d, k=k, **shared))


def contestants(setup: Setup) -> dict[str, Contestant]:
    torch.manual_seed(0)
    found: dict[str, Contestant] = {}
    for make in (of_sae_lens, of_ours, of_sparsify, of_dictionary_learning, of_overcomplete):
        try:
            found |= dict(make(setup))
        except ImportError as error:
            print(f"{make.__name__.removeprefix('of_')}: skipped, {error}", flush=True)
    found[FLOOR] = Contestant(partial(torch.matmul, other=torch.randn(setup.d, setup.f, device=setup.device)))
    return found


@torch.no_grad()
def look(one: Contestant, heldout: Tensor) -> None:
    """A point of the curve: R² and L0 of held-out rows, after so many seconds of training."""
    if one.read is not None:
        active, out = one.read(heldout)
        left = (heldout - out).double().square().sum() / (heldout - heldout.mean(0)).double().square().sum()
        point = {"step": len(one.seconds), "seconds": sum(one.seconds), "r2": 1 - float(left)}
        one.curve.append({**point, "l0": float(active.double().mean())})


def reached(curve: list[dict[str, float]], setup: Setup, step: float) -> float | None:
    """Seconds of steps until the reconstruction was first good enough, and sparse enough."""
    steps = (point["step"] for point in curve if point["r2"] >= setup.reach and point["l0"] <= 1.5 * setup.l0)
    first = next(steps, None)
    return None if first is None else first * step


def train(running: dict[str, Contestant], setup: Setup) -> dict[str, dict[str, Any]]:
    """All in turns; what JSON holds of each."""
    generator = torch.Generator().manual_seed(1)
    wait = torch.cuda.synchronize if torch.device(setup.device).type == "cuda" else lambda: None
    for number in range(setup.warm_up + setup.rounds):
        x = setup.rows[torch.randint(len(setup.rows), (setup.batch,), generator=generator)].to(setup.device)
        for one in running.values():
            if number % setup.every == 0:
                look(one, setup.heldout)
            wait()
            start = time.perf_counter()
            output = one.step(x)
            wait()
            one.seconds.append(time.perf_counter() - start)
            if one.trainer is not None:
                one.losses.append(float(output.loss.detach()))
    found: dict[str, dict[str, Any]] = {}
    timed = {name: statistics.median(one.seconds[setup.warm_up :]) for name, one in running.items()}
    for name, one in running.items():
        look(one, setup.heldout)
        found[name] = {
            "median_s": timed[name],
            "quartiles_s": statistics.quantiles(one.seconds[setup.warm_up :], n=4)[::2],
            "fastest_s": min(one.seconds[setup.warm_up :]),
            "activations_per_s": setup.batch / timed[name],
            "times_sae_lens": timed[BASE] / timed[name],
            "share_of_encoder_product": timed[FLOOR] / timed[name],
            "l0_at_the_end": one.curve[-1]["l0"] if one.curve else None,
            "r2_at_the_end": one.curve[-1]["r2"] if one.curve else None,
            "seconds_to_reach": reached(one.curve, setup, timed[name]),
            "entries_at_the_end": float(one.trainer.sae.density) if name.startswith("TSAE, sparse") else None,
            "curve": one.curve,
            "losses": one.losses,
        }
    return found


def gradients(trainer: Any, x: Tensor) -> dict[str, Tensor]:
    """Of all parameters, for one batch, with noise from a fresh generator."""
    sae: TSAETraining = trainer.sae.train()
    sae.generator.manual_seed(1)
    sae.zero_grad()
    dead, coefficients = trainer.dead_neurons, trainer.get_coefficients()
    given = TrainStepInput(trainer.activation_scaler(x), coefficients, dead, trainer.n_training_steps, False)
    sae.training_forward_pass(given).loss.backward()
    return {name: one.grad.clone() for name, one in sae.named_parameters() if one.grad is not None}


def difference(dense: Contestant, other: Contestant, x: Tensor) -> dict[str, Any]:
    """Relative differences of the losses over the run, and of each gradient for one batch, from equal weights.

    A gradient's is relative to its largest entry. Losses part sooner or later, as an entry that rounding takes over its
    threshold changes all that follows; `--control` shows when they would anyway, by two dense runs that start a bit
    apart. To be called last: `other` gets the weights of `dense`.
    """
    losses = [abs(one - two) / abs(one) for one, two in zip(dense.losses, other.losses, strict=True)]
    together = next((number for number, value in enumerate(losses) if value > 1e-6), len(losses))
    other.trainer.sae.load_state_dict(dense.trainer.sae.state_dict())
    expected, found = gradients(dense.trainer, x), gradients(other.trainer, x)
    assert expected.keys() == found.keys()
    apart = {name: (g - found[name]).abs().max() / g.abs().max().clamp(min=1e-30) for name, g in expected.items()}
    return {
        "losses": max(losses),
        "steps_within_1e-6": together,
        "gradients": {name: float(value) for name, value in apart.items()},
    }


def measure(setup: Setup, about: str) -> dict[str, Any]:
    """One size."""
    running = contestants(setup)
    steps = train(running, setup)
    x = setup.rows[: setup.batch].to(setup.device)
    apart = {
        name: difference(running[DENSE], one, x)
        for name, one in running.items()
        if name.startswith("TSAE") and name != DENSE
    }
    size = {"d": setup.d, "F": setup.f, "batch": setup.batch, "target_l0": setup.l0, "data": about}
    size |= {"warm_up": setup.warm_up, "rounds": setup.rounds, "reach": setup.reach}
    return {**size, "steps": steps, "difference_from_dense": apart}


def table(one: dict[str, Any]) -> str:
    reach = f"to {one['reach']:g}"
    lines = [
        f"d = {one['d']}, F = {one['F']}, batch {one['batch']}, target L0 {one['target_l0']:g}, "
        f"{one['rounds']} steps after {one['warm_up']}, {torch.get_num_threads()} threads; {one['data']}",
        f"  {'':30} {'ms per step (quartiles)':>24} {'rows/s':>8} {'ratio':>7} {'floor':>6} {'L0':>7} {'R²':>8} "
        f"{reach:>9}",
    ]
    for name, row in one["steps"].items():
        low, high = (1e3 * value for value in row["quartiles_s"])
        line = f"  {name:30} {1e3 * row['median_s']:8.1f} {f'({low:.1f}-{high:.1f})':>15}"
        line += f" {row['activations_per_s']:8,.0f} {row['times_sae_lens']:6.2f}x"
        line += f" {row['share_of_encoder_product']:6.0%}"
        if row["r2_at_the_end"] is not None:
            line += f" {row['l0_at_the_end']:7.1f} {row['r2_at_the_end']:8.3f}"
            line += f" {'not' if row['seconds_to_reach'] is None else format(row['seconds_to_reach'], '.1f') + ' s':>9}"
        lines.append(line + (f"  {row['entries_at_the_end']:.1%} of entries" if row["entries_at_the_end"] else ""))
    for name, apart in one["difference_from_dense"].items():
        grads = ", ".join(f"{key} {value:.0e}" for key, value in apart["gradients"].items())
        losses = f"{apart['steps_within_1e-6']} losses within 1e-6, all within {apart['losses']:.0e}"
        lines.append(f"  {name}, from dense: {losses}; gradients: {grads}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help="d x F")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps, at least 2")
    parser.add_argument("--warm-up", type=int, help="steps before that; 60, or 30 where d F is above 5 million")
    parser.add_argument("--every", type=int, default=15, help="steps between two looks at R²")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--l0", type=float, default=16, help="target L0, and k of TopK")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--encoder", default="free", choices=["free", "tied"], help="of the TSAEs")
    parser.add_argument("--data", default="auto", choices=["auto", "cities", "planted", "gaussian"])
    parser.add_argument("--control", action="store_true", help="a dense TSAE that starts a bit off: how losses part")
    parser.add_argument("--reach", type=float, default=0.45, help="held-out R² whose time is given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for d, f in (map(int, size.split("x")) for size in arguments.sizes.split(",")):
        x, about = activations(arguments.data, d)
        same = ("batch", "l0", "lr", "encoder", "device", "rounds", "every", "control", "reach")
        shared: dict[str, Any] = {name: getattr(arguments, name) for name in same}
        shared["warm_up"] = (60 if d * f < 5_000_000 else 30) if arguments.warm_up is None else arguments.warm_up
        setup = Setup(d, f, x[HELDOUT:], x[:HELDOUT].to(arguments.device), **shared)
        results.append(measure(setup, about))
        print(table(results[-1]), flush=True)
    if arguments.json:
        installed = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
        versions = {name: installed.get(name) for name in LIBRARIES}
        about = {"versions": versions, "arguments": {**vars(arguments), "json": str(arguments.json)}}
        arguments.json.write_text(json.dumps({**about, "sizes": results}, indent=2) + "\n")
