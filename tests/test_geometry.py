"""The metric against numpy and scikit-learn, its invariances, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS

from atom_lens import AtomicInnerProduct, SecondMoment, angle_histogram


def test_metric_is_the_inverse_second_moment(generator: torch.Generator) -> None:
    x = shifted(500, 12, generator).double()
    aip = AtomicInnerProduct.estimate(x, ridge=0.0)
    c = x.numpy().T @ x.numpy() / 500
    np.testing.assert_allclose(aip.metric.numpy(), np.linalg.inv(c), rtol=1e-8)
    np.testing.assert_allclose(aip.condition, np.linalg.cond(c), rtol=1e-6)
    whitened = aip.whiten(x)
    torch.testing.assert_close(whitened.T @ whitened / 500, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(aip.unwhiten(whitened), x)
    u, v = x[:5].numpy(), x[5:9].numpy()
    s = np.linalg.inv(c)
    expected = (u @ s @ v.T) / np.sqrt(np.einsum("nd,de,ne->n", u, s, u))[:, None]
    expected /= np.sqrt(np.einsum("nd,de,ne->n", v, s, v))
    np.testing.assert_allclose(aip.cosine(x[:5], x[5:9]).numpy(), expected, atol=1e-9)


def test_square_roots_are_symmetric(generator: torch.Generator) -> None:
    aip = AtomicInnerProduct.estimate(shifted(100, 7, generator))
    torch.testing.assert_close(aip.sqrt, aip.sqrt.T)
    torch.testing.assert_close(aip.sqrt @ aip.inverse_sqrt, torch.eye(7, dtype=torch.float64))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 199), min_size=1, max_size=4, unique=True))
def test_second_moment_streams_and_merges(seed: int, cuts: list[int]) -> None:
    x = shifted(200, 6, torch.Generator().manual_seed(seed))
    whole = SecondMoment(6).update(x)
    merged = SecondMoment(6)
    for part in torch.tensor_split(x, sorted(cuts)):
        merged.merge(SecondMoment(6).update(part))
    assert merged.n == whole.n == 200
    torch.testing.assert_close(merged.matrix, whole.matrix, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_cosines_do_not_change_under_invertible_maps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = shifted(300, 5, generator).double()
    a = torch.randn(5, 5, generator=generator, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    before = AtomicInnerProduct.estimate(x, ridge=0.0).cosine(x[:10], x[10:20])
    after = AtomicInnerProduct.estimate(x @ a, ridge=0.0).cosine(x[:10] @ a, x[10:20] @ a)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def test_ridge_is_relative_to_the_spectrum(generator: torch.Generator) -> None:
    x = shifted(300, 5, generator)
    small, large = (AtomicInnerProduct.estimate(x * s, ridge=1e-2) for s in (1e-3, 1e3))
    assert small.condition == pytest.approx(large.condition, rel=1e-4)


def test_oas_agrees_with_scikit_learn(generator: torch.Generator) -> None:
    x = shifted(40, 60, generator, shift=0.3).double()
    aip = AtomicInnerProduct.estimate(x, ridge="oas")
    reference = torch.from_numpy(OAS(assume_centered=True).fit(x.numpy()).precision_)
    torch.testing.assert_close(aip.metric / aip.metric.norm(), reference / reference.norm(), rtol=1e-6, atol=1e-9)


def test_saves_exactly(tmp_path, generator: torch.Generator) -> None:
    aip = AtomicInnerProduct.estimate(shifted(100, 9, generator), source="a test")
    loaded = AtomicInnerProduct.load(aip.save(tmp_path / "aip.safetensors"))
    assert torch.equal(loaded.metric, aip.metric)
    assert (loaded.n, loaded.ridge, loaded.source) == (100, aip.ridge, "a test")
    assert [p.name for p in tmp_path.iterdir()] == ["aip.safetensors"]


def test_angles_of_all_pairs(generator: torch.Generator) -> None:
    x = shifted(70, 8, generator)
    found = angle_histogram(x)
    u = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(u @ u.T, -1, 1)))[np.triu_indices(70, 1)]
    assert found.pairs == 70 * 69 // 2
    assert found.mean == pytest.approx(angles.mean(), abs=1e-9)
    assert found.median == pytest.approx(np.median(angles), abs=0.06)
    expected, _ = np.histogram(angles, bins=3600, range=(0, 180))
    # A pair on the edge of a bin may be rounded to either side.
    assert np.abs(np.cumsum(found.counts.numpy()) - np.cumsum(expected)).max() <= 1


def test_shift_is_seen_and_undone(generator: torch.Generator) -> None:
    # The mean stays one direction of d, of cosine 1/d between any two: 0.4 degrees at this width.
    x = shifted(1500, 160, generator, shift=3)
    assert angle_histogram(x).mean < 45
    assert angle_histogram(x, AtomicInnerProduct.estimate(x)).mean == pytest.approx(90, abs=0.5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "x is empty: it has 0 rows of width 3"),
        (torch.ones(1, 3), "at least 2 rows, got 1"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [1.0, 1.0]]), "1 rows with NaN or infinite values, .* row 1"),
        (torch.randn(3, 8), "rank 3 of width 8"),
    ],
)
def test_refuses(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtomicInnerProduct.estimate(x)


def test_refuses_wrong_width_and_values(generator: torch.Generator) -> None:
    aip = AtomicInnerProduct.estimate(shifted(100, 5, generator))
    with pytest.raises(ValueError, match="x has width 4, expected 5"):
        aip.whiten(torch.ones(3, 4))
    with pytest.raises(ValueError, match="cannot merge second moments of width 3 and 5"):
        SecondMoment(5).merge(SecondMoment(3))
    with pytest.raises(ValueError, match="ridge is -1"):
        AtomicInnerProduct.estimate(torch.randn(50, 5), ridge=-1.0)
    with pytest.raises(ValueError, match="row 2 is zero"):
        angle_histogram(torch.tensor([[1.0, 0], [0, 1.0], [0, 0]]))


def test_refuses_files_that_are_no_metric(tmp_path) -> None:
    path = tmp_path / "aip.safetensors"
    with pytest.raises(FileNotFoundError, match="no metric at"):
        AtomicInnerProduct.load(path)
    path.write_bytes(b"not a metric")
    with pytest.raises(ValueError, match="is not a metric saved by atom_lens"):
        AtomicInnerProduct.load(path)
