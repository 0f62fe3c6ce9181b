"""Rows that are read when asked for, pairs by the tile, batches of prompts: the same as with everything in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.learners import tsae_learner

from atom_lens import AtomicInnerProduct, evaluate
from atom_lens.activations.harvest import _batches
from atom_lens.dictionaries.nulls import shuffle_coordinates
from atom_lens.dictionaries.registry import finish
from atom_lens.recipe.sections import Atoms, Training
from atom_lens.tensors.rows import Rows, mean_row, scratch
from atom_lens.tensors.tiles import over_tiles, pairs_of
from atom_lens.training.fit import fit_together


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), d=st.integers(1, 4), size=st.integers(1, 5), seed=st.integers(0, 99), mapped=st.booleans())
def test_rows_are_the_matrix_they_stand_for(n: int, d: int, size: int, seed: int, mapped: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, d, generator=generator)
    keep = torch.rand(n, generator=generator) < 0.7
    order = torch.randperm(int(keep.sum()), generator=generator)
    map = torch.randn(d, 3, generator=generator, dtype=torch.float64)
    expected, rows = matrix[keep][order], Rows(matrix).select(keep).select(order)
    if mapped:
        expected, rows = (expected.double() @ map).float(), rows.through(map)
    assert rows.shape == expected.shape and len(rows) == len(expected) and rows.dtype == torch.float32
    assert torch.equal(rows[:], expected)
    assert torch.equal(rows[torch.arange(0, len(rows), 2)], expected[::2])
    assert torch.equal(rows[torch.ones(len(rows), dtype=torch.bool)], expected)
    assert [len(part) for part in rows.split(size)] == [len(part) for part in expected.split(size) if len(part)]
    if len(rows):
        assert torch.equal(torch.cat(list(rows.split(size))), expected)
        torch.testing.assert_close(mean_row(rows), expected.double().mean(dim=0))


def test_a_training_on_mapped_rows_is_that_in_memory(generator: torch.Generator) -> None:
    """Atoms, and every figure of their report, to the last bit."""
    x = torch.randn(300, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 1
    on_disk = scratch(300, 8)
    on_disk.copy_(x)
    order = torch.randperm(300, generator=generator)
    found = []
    for rows, heldout in (
        (x[order[:240]], x[order[240:]]),
        (Rows(on_disk, order[:240]), Rows(on_disk, order[240:])),
    ):
        aip = AtomicInnerProduct.estimate(rows)
        learner = tsae_learner(rows, aip, Atoms(capacity=24, target_l0=2.0))
        fit_together({"x": rows}, {"tsae": learner}, Training(steps=20, batch_size=32, device="cpu"))
        report = evaluate(finish(learner, aip), rows, heldout)
        found.append({key: report[key] for key in ("train", "heldout", "nulls", "certificates", "angles")})
    assert found[0] == found[1]


def test_scratch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x = scratch(10, 3)
    x[:] = 1
    assert float(x.sum()) == 30 and list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_shuffled_columns_keep_their_values(n: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    shuffled = shuffle_coordinates(Rows(x), generator)
    assert torch.equal(shuffled.sort(dim=0).values, x.sort(dim=0).values)
    if n == 40 and d > 1:
        assert not torch.equal(shuffled, x)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), tile=st.integers(1, 9), threads=st.integers(1, 3))
def test_tiles_hold_every_pair_once(n: int, tile: int, threads: int) -> None:
    u = torch.eye(n, dtype=torch.float64) * torch.arange(1, n + 1)[:, None] + 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        parts = list(over_tiles(u, pairs_of, tile))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    row, column = torch.triu_indices(n, n, 1)
    expected = (u @ u.T)[row, column]
    assert torch.equal(torch.cat(parts).sort().values, expected.sort().values)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 4096))
def test_batches_hold_every_prompt_once(lengths: list[int], budget: int) -> None:
    batches = list(_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert lengths[batch[0]] == longest
        assert len(batch) == 1 or len(batch) * longest <= budget
        # Once it was a quarter full, it took in nothing that is much shorter.
        full = -(-budget // (4 * longest))
        assert all(lengths[i] >= 0.9 * longest for i in batch[full:])
