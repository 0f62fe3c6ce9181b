"""What public functions take: indices, masks, labels, matrices and seeds in every form that people have them in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

from atom_lens.interventions.edits import Place, ablate, add, scale

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
