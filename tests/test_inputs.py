"""What public functions take: indices, masks, labels, matrices and seeds in every form that people have them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from atom_lens import AtomicInnerProduct, evaluate, faithfulness, stability
from atom_lens.dictionaries.baselines.bases import neurons
from atom_lens.dictionaries.nulls import random_atoms
from atom_lens.evidence.identity import identity
from atom_lens.evidence.measure import observe
from atom_lens.evidence.purity import purity
from atom_lens.interventions.edits import Place, ablate, add, scale
from atom_lens.recipe.split import heldout_rows

CPU = torch.device("cpu")


@contextmanager
def refused(match: str) -> Iterator[None]:
    """One sentence from the code itself: users run it without the checks of types that tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=match):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def forms(flags: list[bool]) -> list[Any]:
    """One choice, as a mask and as indices, of every type."""
    where = [i for i, flag in enumerate(flags) if flag]
    return [
        flags,
        tuple(flags),
        np.array(flags),
        torch.tensor(flags),
        where,
        np.array(where),
        torch.tensor(where, dtype=torch.int32),
        [np.int64(i) for i in where],
        list(torch.tensor(where)),
    ]


@pytest.mark.parametrize("chosen", forms([False, False, True, True]))
def test_a_mask_and_indices_choose_the_same(chosen: Any):
    wanted = torch.tensor([[False, False, True, True]])
    assert Place(positions=chosen).mask(1, 4, 0, CPU).equal(wanted)
    assert Place(items=chosen).mask(4, 1, 0, CPU).equal(wanted.T)
    codes, items = torch.ones(1, 4), torch.zeros(1, dtype=torch.long)
    assert ablate(chosen)(codes, items).tolist() == [[1, 1, 0, 0]]
    assert add(chosen, np.array([1.0, 2.0]))(codes, items).tolist() == [[1, 1, 2, 3]]


def test_one_index_has_every_type():
    for one in (2, np.int64(2), torch.tensor(2)):
        assert Place(positions=one).mask(1, 4, 0, CPU).nonzero().tolist() == [[0, 2]]
        assert ablate(one)(torch.ones(1, 4), torch.zeros(1, dtype=torch.long)).tolist() == [[1, 1, 0, 1]]
    assert scale(2, torch.tensor(3.0))(torch.ones(1, 4), torch.zeros(1, dtype=torch.long)).tolist() == [[1, 1, 3, 1]]


@pytest.mark.parametrize("kind", [torch.long, torch.bool])
def test_an_attention_mask_is_a_mask_of_positions(kind: torch.dtype):
    table = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert Place(positions=table.to(kind)).mask(2, 3, 0, CPU).equal(table.bool())
    assert Place(positions=table.to(kind)).mask(2, 2, 1, CPU).equal(table.bool()[:, 1:])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (True, "holds True, allowed are integers"),
        (torch.tensor(True), "holds True, allowed are integers"),
        ([True, 2], "holds True, allowed are integers"),
        (1.0, "holds 1.0, allowed are integers"),
        ([1.0], "holds 1.0, allowed are integers"),
        (torch.tensor([1.0]), "has numbers of type torch.float32"),
        (torch.tensor([0, 1], dtype=torch.uint8), "has numbers of type torch.uint8"),
        (torch.zeros(1, 1, 1, dtype=torch.bool), r"has shape \(1, 1, 1\)"),
        ("last", "holds 'last', allowed are integers"),
    ],
)
def test_what_is_neither_indices_nor_a_mask_is_refused(wrong: Any, why: str):
    with refused("position " + why):
        Place(positions=wrong)
    with refused("item " + why):
        Place(items=wrong)
    with refused("atom " + why):
        ablate(wrong)


def test_choices_that_do_not_fit_are_refused():
    with refused("the mask of positions has 3 booleans, the prompt with its padding has 4"):
        Place(positions=[True, False, True]).mask(1, 4, 0, CPU)
    with refused("item -1 is outside the batch, allowed are 0 to 1"):
        Place(items=[-1]).mask(2, 4, 0, CPU)
    with refused("position 0 is chosen more than once; a mask holds booleans"):
        Place(positions=torch.tensor([0, 0, 1, 0])).mask(1, 4, 0, CPU)
    with refused("positions has two dimensions, a mask"):
        Place(positions=torch.tensor([[0, 2]]))
    with refused("the mask of atoms has 2 booleans, the dictionary has 4"):
        ablate([True, False])(torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
    with refused("expected at least one index and each only once, or a mask"):
        ablate([False, False])


class Signed:
    """Positive parts of the coordinates."""

    W_dec = torch.eye(3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_dec).relu()

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return feature_acts @ self.W_dec


X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
HELDOUT = X[:8].repeat_interleave(3, dim=0) + 0.5
GROUPS = [i // 3 for i in range(24)]


def label_forms(names: list[int]) -> list[Any]:
    return [tuple(names), np.array(names), torch.tensor(names), list(torch.tensor(names)), list(np.array(names))]


@pytest.mark.slow
def test_labels_are_equal_where_their_values_are():
    metric = AtomicInnerProduct.estimate(X)
    wanted = evaluate(Signed(), X, HELDOUT, metric, groups=GROUPS)["heldout"]["interval"]
    alone = evaluate(Signed(), X, HELDOUT, metric)["heldout"]["interval"]
    assert wanted != alone
    codes = (torch.rand(24, 2, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pure = purity(codes, GROUPS, permutations=20).figures
    out = heldout_rows(GROUPS, 0.3, 0)
    for names in label_forms(GROUPS):
        assert evaluate(Signed(), X, HELDOUT, metric, groups=names)["heldout"]["interval"] == wanted
        assert heldout_rows(names, 0.3, 0).equal(out)
        assert purity(codes, names, permutations=20).figures == pure
    assert purity(codes, [f"{name:02d}" for name in GROUPS], permutations=20).figures == pure


def test_what_is_refused_before_any_work():
    metric = AtomicInnerProduct.estimate(X)
    for seed in (-3, 2**70, True, 1.5):
        with refused("seed is .*, allowed are the integers from 0"):
            evaluate(Signed(), X, HELDOUT, metric, seed=seed)  # pyright: ignore[reportArgumentType]
    with refused("groups holds nan, which is no label"):
        evaluate(Signed(), X, HELDOUT, metric, groups=[float("nan")] * 24)
    with refused("the train split has numbers of type torch.int64, allowed are floating-point numbers"):
        evaluate(Signed(), X.long(), HELDOUT, metric)
    with refused("x has numbers of type int64"):
        AtomicInnerProduct.estimate(X.long().numpy())
    with refused("x is of type list"):
        faithfulness(X.tolist(), X)  # pyright: ignore[reportArgumentType]
    with refused("alive holds 3 indices, expected one boolean for each of 3"):
        stability(X[:3], torch.tensor([1]), alive=torch.tensor([0, 1, 1]))
    with refused(r"alive\[0\] holds 2 indices, expected one boolean for each of 3"):
        identity([X[:3], X[3:6]], alive=[torch.tensor([0, 1]), torch.tensor([0, 1])])


def test_numpy_and_half_precision_are_taken():
    metric = AtomicInnerProduct.estimate(X.numpy())
    assert metric.metric.equal(AtomicInnerProduct.estimate(X.clone().requires_grad_()).metric)
    wanted = evaluate(Signed(), X, HELDOUT, metric)
    report = evaluate(Signed(), X.numpy(), HELDOUT.numpy(), metric)
    assert report["heldout"] == wanted["heldout"]
    half = evaluate(Signed(), X.bfloat16(), HELDOUT.bfloat16(), metric)
    assert half["heldout"]["r2"] == pytest.approx(wanted["heldout"]["r2"], abs=0.02)
    atoms = random_atoms(5, metric, torch.Generator().manual_seed(0))
    alive = [True, True, True, False, True]
    found = stability(atoms.numpy(), np.array([1, 2]), metric, alive)
    assert found.q_star == stability(atoms, torch.tensor([1, 2]), metric, torch.tensor(alive)).q_star


def test_metrics_and_batches_that_make_no_sense(generator: torch.Generator) -> None:
    x = torch.randn(60, 4, generator=generator)
    c = x.T.double() @ x.double() / 60
    for wrong in (-c, c - 5 * torch.eye(4, dtype=torch.float64)):
        with refused("the second moment has a negative eigenvalue, -"):
            AtomicInnerProduct(wrong, 60)
    aip = AtomicInnerProduct.estimate(x)
    for batch in (0, -1):
        with refused(f"batch is {batch}, allowed is at least 1"):
            observe(neurons(x), x, aip, batch=batch)


def test_an_activation_of_zero_is_an_activation(generator: torch.Generator) -> None:
    """Hidden activations of a ReLU may all be off at a token: its angles are left out, all else counts it."""
    x = torch.randn(60, 4, generator=generator)
    x[7] = 0
    report = evaluate(neurons(x), x, x[5:30], AtomicInnerProduct.estimate(x))
    assert report["heldout"]["n"] == 25 and report["heldout"]["r2"] == pytest.approx(1)
