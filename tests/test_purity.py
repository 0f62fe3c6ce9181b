"""Purity against scikit-learn and brute force; planted units are found, random ones are not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_array
from scipy.stats import kstest
from sklearn.metrics import mutual_info_score

from atom_lens.evidence.purity import purity


def drawn(n: int, units: int, rate: float, seed: int = 0) -> np.ndarray:
    """Codes of either sign, non-zero at random."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, units)) * (draw.random((n, units)) < rate)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 60), st.integers(1, 12), st.integers(2, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_figures_are_those_of_scikit_learn_and_brute_force(n: int, f: int, k: int, top: int, seed: int) -> None:
    codes, labels = drawn(n, f, 0.3, seed), np.random.default_rng(seed).integers(0, k, n)
    if len(set(labels.tolist())) < 2:
        return
    found = purity(csc_array(codes), labels, top=top, least=3, permutations=2)
    active = codes != 0
    assert found.latents.tolist() == np.flatnonzero(active.sum(axis=0) >= 3).tolist()
    assert found.left_out == f - len(found.latents)
    assert found.entropy == pytest.approx(mutual_info_score(labels, labels) / np.log(2))
    for at, unit in enumerate(found.latents):
        expected = mutual_info_score(active[:, unit], labels) / np.log(2)
        assert found.information.observed[at] == pytest.approx(expected, abs=1e-12)
        rows = sorted(np.flatnonzero(active[:, unit]), key=lambda row: -abs(codes[row, unit]))[:top]
        share = Counter(labels[rows].tolist()).most_common(1)[0][1] / len(rows)
        assert found.share.observed[at] == pytest.approx(share)


def test_the_null_is_the_labels_permuted() -> None:
    codes, labels = drawn(80, 6, 0.3), np.random.default_rng(1).integers(0, 4, 80)
    found = purity(csc_array(codes), labels, permutations=3, seed=5)
    draw = np.random.default_rng(5)
    for permuted in range(3):
        again = purity(csc_array(codes), draw.permutation(labels), permutations=1)
        np.testing.assert_allclose(found.information.null[permuted], again.information.observed)
        np.testing.assert_allclose(found.share.null[permuted], again.share.observed)
    reached = (found.share.null >= found.share.observed).sum(axis=0)
    np.testing.assert_allclose(found.share.p, (1 + reached) / 4)


def test_counts_are_the_same_in_a_table_and_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, labels = csc_array(drawn(300, 20, 0.1)), np.random.default_rng(1).integers(0, 30, 300)
    table = purity(codes, labels, permutations=50)
    monkeypatch.setattr("atom_lens.evidence.purity._SPARSE", 0)
    monkeypatch.setattr("atom_lens.evidence.purity._AT_ONCE", 2000)
    other = purity(codes, labels, permutations=50)
    for one, same in ((table.information, other.information), (table.share, other.share)):
        np.testing.assert_array_equal(one.observed, same.observed)
        np.testing.assert_array_equal(one.null, same.null)


def test_planted_units_are_found() -> None:
    """Half the units are active at one label only, half at random."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, 1000)
    planted = np.stack([(labels == unit) & (draw.random(1000) < 0.5) for unit in range(10)], axis=1)
    codes = np.concatenate([planted, drawn(1000, 10, 0.05)], axis=1)
    found = purity(csc_array(codes * 1.0), labels)
    assert (found.share.observed[:10] == 1).all() and (found.information.p[:10] == 1 / 2001).all()
    assert (found.information.observed[:10] > found.information.null[:, :10].max(axis=0)).all()
    figures = found.figures
    assert figures["information"]["above_null_fdr"] == pytest.approx(0.5, abs=0.1)
    assert figures["information"]["excess"] > 0.05


def test_random_units_are_not() -> None:
    """p-values of units that know nothing are uniform, and one in twenty is above its null: no more survive."""
    labels = np.random.default_rng(1).integers(0, 12, 600)
    found = purity(csc_array(drawn(600, 1500, 0.08)), labels)
    assert kstest(found.information.p, "uniform").pvalue > 0.01
    figures = found.figures
    assert figures["information"]["above_null"] == pytest.approx(0.05, abs=0.02)
    assert figures["information"]["above_null_fdr"] < 0.01
    low, high = figures["information"]["null_interval"]
    assert low < figures["information"]["mean"] < high
    # Purity has few values, so ties make its test conservative, never lax.
    assert figures["purity"]["above_null"] <= 0.06
    assert figures["purity"]["null_interval"][0] < figures["purity"]["mean"] < figures["purity"]["null_interval"][1]


def test_zeros_that_are_stored_are_not_active() -> None:
    codes = csc_array(drawn(50, 4, 0.5))
    holes = codes.copy()
    holes.data[::3] = 0
    labels = np.arange(50) % 3
    dense = purity(csc_array(holes.toarray()), labels, permutations=2)
    sparse = purity(holes, labels, permutations=2)
    np.testing.assert_array_equal(dense.active, sparse.active)
    np.testing.assert_allclose(dense.information.observed, sparse.information.observed)


def test_no_unit_is_active_often_enough() -> None:
    found = purity(csc_array(drawn(30, 3, 0.5)), np.arange(30) % 2, least=31).figures
    assert found["latents"] == 0 and found["left_out"] == 3 and found["information"] is None


def test_labels_must_fit() -> None:
    codes = csc_array(drawn(30, 3, 0.5))
    with pytest.raises(ValueError, match="labels has 29 rows, expected 30"):
        purity(codes, np.arange(29))
    with pytest.raises(ValueError, match="all labels are the same"):
        purity(codes, np.ones(30, dtype=int))
