"""Baselines that a comparison may name: more of sae-lens' kinds, independent components, greedy data points."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from conftest import shifted
from scipy.optimize import linear_sum_assignment

from atom_lens import AtomicInnerProduct
from atom_lens.dictionaries import Setup, Trained, find_kind
from atom_lens.dictionaries.baselines.ica import Components
from atom_lens.dictionaries.baselines.itda import greedy_atoms
from atom_lens.dictionaries.nulls import Pursuit, data_atoms
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.training.fit import fit_together


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("abstopk", True),
        ("abstopk_whitened", True),
        ("matching_pursuit", True),
        ("matryoshka_batchtopk", False),
        ("matryoshka_batchtopk_whitened", False),
    ],
)
def test_more_of_sae_lens(name: str, exact: bool, generator: torch.Generator) -> None:
    """They learn, and act on raw activations; those with a K have it, thresholds of others are still on their way."""
    x = shifted(600, 16, generator)
    one = find_kind(name, Trained)
    setup = Setup(x, AtomicInnerProduct.estimate(x), Atoms(capacity=32, target_l0=4.0))
    learner = one.start(setup, 4.0, 0)
    fit_together({"x": x}, {"a": learner}, Training(steps=60, batch_size=64, device="cpu", lr=1e-2))
    sae = one.finish(learner, setup.aip)
    with torch.no_grad():
        codes = sae.encode(x)
        l0 = (codes != 0).sum(1).double()
        left = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    assert (l0 == 4).all() if exact else l0.mean() < 16
    assert float(left) < 1


def test_matching_pursuit_has_no_whitening() -> None:
    with pytest.raises(ValueError, match="'matching_pursuit_whitened' is unknown, did you mean matching_pursuit"):
        find_kind("matching_pursuit_whitened")


def test_independent_components_are_found(generator: torch.Generator) -> None:
    """Laplacian sources through an ill-conditioned map: each component is one of them, all together are all of x."""
    d, n = 12, 6000
    sources = torch.distributions.Laplace(0.0, 1.0).sample((n, d))
    mixing = torch.randn(d, d, generator=generator) @ torch.diag(torch.logspace(0, 1.5, d))
    x = sources @ mixing + 5
    aip = AtomicInnerProduct.estimate(x)
    found = Components(x, aip, d)
    assert float((x - found.decode(found.encode(x))).abs().max()) < 1e-2
    match = aip.cosine(found.W_dec, mixing).abs()
    rows, columns = linear_sum_assignment(-match.numpy())
    assert float(match[rows, columns].mean()) > 0.97
    sparse = Components(x, aip, 3).encode(x)
    assert ((sparse != 0).sum(1) == 3).all() and (sparse < 0).any()


def test_greedy_data_points_are_what_is_left_over(generator: torch.Generator) -> None:
    """Rows of the data, centred; rare directions among them, which atoms drawn at random miss."""
    directions = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    often = torch.randint(4, (3960,), generator=generator)
    rare = torch.arange(40) % 20 + 4
    x = directions[torch.cat([often, rare])] * (1 + torch.rand(4000, 1, generator=generator))
    x = x[torch.randperm(len(x), generator=generator)]
    aip, mean = AtomicInnerProduct.estimate(x), x.mean(0)
    greedy = greedy_atoms(x, aip, 40, 2, generator)
    assert greedy.shape == (40, 24)
    assert ((greedy[:, None] - (x - mean)[None]).abs().amax(dim=2).amin(dim=1) < 1e-5).all()
    drawn = data_atoms(x, 40, mean, generator)

    def left(atoms: torch.Tensor) -> float:
        return float(Pursuit(atoms, mean, aip, 2).residual(x).mean())

    assert left(greedy) < 0.5 * left(drawn)


def test_a_comparison_has_them(run: Callable[..., tuple[int, str, str]]) -> None:
    units = {"kinds": ["ica", "itda", "abstopk"], "l0": [2]}
    code, out, err = run(f"compare={json.dumps(units)}", "name=more", command="compare")
    assert code == 0, err
    assert all(label in out for label in ("FastICA", "ITDA: greedy data points", "AbsTopK"))
