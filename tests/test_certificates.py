"""Certificates, recovery and identity against brute force and independent solvers, and by their properties."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sklearn.linear_model import orthogonal_mp

from atom_lens import AtomicInnerProduct
from atom_lens.dictionaries.baselines.bases import neurons, principal
from atom_lens.dictionaries.nulls import Pursuit, random_atoms, shuffle_coordinates
from atom_lens.evidence.certificates import (
    atom_coherence,
    certify_codes,
    rip_bound,
    unique_atoms,
)
from atom_lens.evidence.certify import certify
from atom_lens.evidence.identity import extreme_level, identity, match
from atom_lens.evidence.measure import observe
from atom_lens.evidence.recovery import basis_pursuit_agrees, pursuit_agrees
from atom_lens.evidence.window import threshold_window

seeds = st.integers(0, 10**6)


def cosines(atoms: torch.Tensor, aip: AtomicInnerProduct | None = None) -> np.ndarray:
    """The whole Gram matrix in numpy, from the definition of the inner product."""
    a = atoms.double().numpy()
    s = np.eye(a.shape[1]) if aip is None else np.linalg.inv(aip.inverse_sqrt.numpy() @ aip.inverse_sqrt.numpy())
    gram = a @ s @ a.T
    norms = np.sqrt(np.diag(gram))
    return gram / np.outer(norms, norms)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, tile=st.integers(1, 9))
def test_atom_coherence_and_uniqueness_by_definition(seed: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    aip = AtomicInnerProduct.estimate(shifted(60, 5, generator))
    atoms = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    gram = np.abs(cosines(atoms, aip))
    np.fill_diagonal(gram, 0)
    found = atom_coherence(atoms, aip, tile)
    np.testing.assert_allclose(found.numpy(), gram.max(axis=1), atol=1e-10)
    k = torch.randint(1, 4, (14,), generator=generator)
    expected = [gram[i].max() < 1 / (2 * int(k[i]) - 1) for i in range(14)]
    assert unique_atoms(found, k).tolist() == expected
    # More active atoms certify fewer.
    assert bool((unique_atoms(found, k + 1) <= unique_atoms(found, k)).all())


def test_rip_bound() -> None:
    assert rip_bound(0.1, 5) == pytest.approx(0.4)
    assert rip_bound(0.1, 0) == 0.0


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_code_certificates_by_definition(seed: int) -> None:
    """Babel function and exact recovery condition, a code at a time, with numpy's pseudo-inverse."""
    generator = torch.Generator().manual_seed(seed)
    d, n_atoms = 12, 18
    atoms = torch.randn(n_atoms, d, generator=generator, dtype=torch.float64)
    atoms[0] = atoms[1] * -2  # a copy: no support with one of them alone can be certified
    codes = torch.randn(40, n_atoms, generator=generator)
    codes *= torch.rand(40, n_atoms, generator=generator) < torch.linspace(0, 0.25, 40)[:, None]
    found = certify_codes(atoms, codes)
    units = (atoms / atoms.norm(dim=1, keepdim=True)).numpy()
    gram = np.abs(units @ units.T)
    for row in range(40):
        inside = np.flatnonzero(codes[row].numpy())
        outside = np.setdiff1d(np.arange(n_atoms), inside)
        assert int(found.k[row]) == len(inside)
        if len(inside) == 0:
            assert not found.babel[row] and not found.exact_recovery[row]
            continue
        summed = max(gram[j, inside].sum() for j in outside) + max(gram[i, inside].sum() - 1 for i in inside)
        babel = summed < 1 - 1e-5  # the copy makes exact ties
        independent = np.linalg.matrix_rank(units[inside]) == len(inside)
        erc = max(np.abs(np.linalg.pinv(units[inside].T) @ units[j]).sum() for j in outside) < 1 - 1e-5
        assert bool(found.babel[row]) == babel
        assert bool(found.exact_recovery[row]) == (erc and independent)
        assert found.exact_recovery[row] or not found.babel[row]  # Babel implies exact recovery


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_certificates_are_intrinsic(seed: int) -> None:
    """x -> A x changes no certificate once the metric is estimated again; nor do order, length and sign of atoms."""
    generator = torch.Generator().manual_seed(seed)
    x = shifted(200, 6, generator).double()
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
    atoms = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    codes = (torch.rand(50, 20, generator=generator) < 0.1).double()
    before_aip, after_aip = (AtomicInnerProduct.estimate(rows, ridge=0.0) for rows in (x, x @ a))
    before, after = certify_codes(atoms, codes, before_aip), certify_codes(atoms @ a, codes, after_aip)
    assert before.exact_recovery.tolist() == after.exact_recovery.tolist()
    assert before.babel.tolist() == after.babel.tolist()
    coherence = atom_coherence(atoms, before_aip)
    torch.testing.assert_close(coherence, atom_coherence(atoms @ a, after_aip), atol=1e-6, rtol=0)
    order = torch.randperm(20, generator=generator)
    moved = atoms[order] * torch.randn(20, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(coherence[order], atom_coherence(moved, before_aip), atol=1e-9, rtol=0)
    assert certify_codes(moved, codes[:, order], before_aip).babel.tolist() == before.babel.tolist()
    same = match(atoms, atoms[order], before_aip)
    other = match(atoms @ a, (atoms @ a)[order], after_aip)
    assert same.partner.tolist() == order.argsort().tolist() == other.partner.tolist()
    torch.testing.assert_close(same.coherence, torch.ones(20, dtype=torch.float64))


def test_threshold_window_by_hand() -> None:
    one = torch.ones(3)
    window = threshold_window(
        tau=torch.tensor([0.5, 0.1, 0.9]),
        eps=0.1 * one,
        k=torch.tensor([3, 3, 3]),
        k_active=torch.tensor([3, 3, 2]),
        delta_min=0.8 * one,
        delta_max=1.0,
    )
    torch.testing.assert_close(window.lower, 0.3 * one)
    torch.testing.assert_close(window.upper, torch.tensor([0.6, 0.6, 0.7]))
    assert window.inside.tolist() == [True, False, False] and window.feasible.all()
    torch.testing.assert_close(window.outside_by, torch.tensor([0.0, 0.2, 0.2]))


def test_pursuits_against_other_solvers(generator: torch.Generator) -> None:
    """Matching pursuit as scikit-learn's; basis pursuit as the exact linear programme."""
    units = torch.nn.functional.normalize(torch.randn(40, 15, generator=generator, dtype=torch.float64), dim=1)
    codes = torch.zeros(30, 40, dtype=torch.float64)
    codes.scatter_(1, torch.rand(30, 40, generator=generator).topk(4, dim=1).indices, 1.0)
    codes *= torch.rand(30, 40, generator=generator, dtype=torch.float64) + 0.5
    y, active = codes @ units, codes != 0
    omp = orthogonal_mp(units.numpy().T, y.numpy().T, n_nonzero_coefs=4).T != 0
    expected = [(omp[i] & active[i].numpy()).sum() / 4 for i in range(30)]
    np.testing.assert_allclose(pursuit_agrees(y, units, active).numpy(), expected)
    found = basis_pursuit_agrees(y, units, active)
    for i in range(30):
        both = np.concatenate([units.numpy().T, -units.numpy().T], axis=1)
        solved = linprog(np.ones(80), A_eq=both, b_eq=y[i].numpy(), bounds=(0, None)).x
        largest = np.abs(solved[:40] - solved[40:]).argsort()[-4:]
        assert float(found[i]) == pytest.approx(active[i].numpy()[largest].mean())
    assert 0.2 < float((found == 1).double().mean()) < 1  # the case is neither hopeless nor trivial


def test_orthonormal_atoms_certify_everything(generator: torch.Generator) -> None:
    x = shifted(300, 8, generator)
    aip = AtomicInnerProduct.estimate(x)
    basis = principal(x, aip, 8)
    found = certify(basis, x, aip, sample=50)
    assert found["unique_atoms"] == 1.0 and found["codes"]["babel"] == 1.0
    assert found["recovery"]["omp_reconstruction"]["same_support"] == 1.0
    assert found["recovery"]["bp_reconstruction"]["same_support"] == 1.0
    seen = observe(basis, x, aip).figures
    # The counterexample: R² and q* are perfect, and nothing is sparse.
    assert seen["r2"] == pytest.approx(1, abs=1e-6) and seen["q_star"] == 1.0 and seen["l0"]["p50"] == 8


def test_neurons_are_the_standard_basis(generator: torch.Generator) -> None:
    x = shifted(300, 8, generator)
    seen = observe(neurons(x), x, AtomicInnerProduct.estimate(x)).figures
    assert seen["r2"] == pytest.approx(1, abs=1e-9) and seen["l0"]["p50"] == 8


def test_extremes_of_coefficients(generator: torch.Generator) -> None:
    """What the window is made of, from the dense codes on atoms of unit AIP norm."""
    x = shifted(120, 6, generator)
    aip = AtomicInnerProduct.estimate(x)
    atoms = Pursuit(random_atoms(15, aip, generator), x.mean(dim=0), aip, 2)
    seen = observe(atoms, x, aip, batch=50)
    codes = (atoms.encode(x).double() * (atoms.W_dec.double() @ aip.sqrt).norm(dim=1)).abs().numpy()
    for atom in range(15):
        fired = codes[:, atom] > 0
        assert int(seen.k_atom[atom]) == (2 if fired.any() else 0)
        if fired.any():
            assert float(seen.smallest[atom]) == pytest.approx(codes[fired, atom].min(), rel=1e-5)
            assert float(seen.largest[atom]) == pytest.approx(codes[fired, atom].max(), rel=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_matching_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    table = np.abs(cosines(torch.cat([a, b]))[:6, 6:])
    best = max(sum(table[i, p[i]] for i in range(6)) for p in permutations(range(6)))
    assert float(match(a, b).coherence.sum()) == pytest.approx(best)


def test_sparse_matching_finds_what_the_dense_one_finds(generator: torch.Generator) -> None:
    a = torch.randn(300, 24, generator=generator)
    order = torch.randperm(300, generator=generator)
    b = a[order] + 0.2 * torch.randn(300, 24, generator=generator)
    dense, sparse = match(a, b), match(a, b, dense_most=10)
    assert (dense.partner == sparse.partner).double().mean() > 0.99
    assert float(sparse.coherence.mean()) == pytest.approx(float(dense.coherence.mean()), abs=1e-3)
    real = sparse.partner[sparse.partner >= 0]
    assert len(real.unique()) == len(real)


def test_identity(generator: torch.Generator) -> None:
    a = torch.randn(50, 10, generator=generator)
    copies = identity([a, -2 * a[torch.randperm(50, generator=generator)], a])
    assert copies.pw_mcc == pytest.approx(1) and copies.above_09 == 1.0 and copies.above_level == 1.0
    assert all(torch.allclose(scores, torch.ones(50, dtype=torch.float64)) for scores in copies.scores)
    others = identity([torch.randn(400, 64, generator=generator) for _ in range(3)])
    assert others.above_09 == 0.0 and others.above_level < 0.02
    # Dead atoms are matched to nobody.
    alive = torch.arange(50) < 30
    b = a.clone()
    b[30:] = torch.randn(20, 10, generator=generator)
    found = identity([a, b], alive=[alive, alive])
    assert found.pw_mcc == pytest.approx(1) and float(found.scores[0][30:].sum()) == 0.0
    with pytest.raises(ValueError, match="at least 2 runs, got 1"):
        identity([a])
    with pytest.raises(ValueError, match="no living atoms"):
        identity([a, a], alive=[alive, alive & False])


def test_extreme_level_by_simulation(generator: torch.Generator) -> None:
    """The best of 200 random directions exceeds the level about once in a hundred times."""
    level = extreme_level(200, 16)
    directions = torch.nn.functional.normalize(torch.randn(2000, 200, 16, generator=generator), dim=2)
    share = float((directions[:, :, 0].abs().amax(dim=1) > level).double().mean())
    assert 0.004 < share < 0.018


def test_shuffled_coordinates_keep_their_values_only(generator: torch.Generator) -> None:
    x = shifted(2000, 5, generator)
    y = shuffle_coordinates(x, generator)
    torch.testing.assert_close(x.sort(dim=0).values, y.sort(dim=0).values)
    assert np.abs(np.corrcoef(y.T.numpy()) - np.eye(5)).max() < 0.1 < np.abs(np.corrcoef(x.T.numpy()) - np.eye(5)).max()
