"""Pursuit: against scikit-learn, against a plain reference row by row, and what any of its codes has to satisfy."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from support.pursuing import drawn, reference
from torch.nn.functional import normalize

from atom_lens.dictionaries.pursuit import omp
from atom_lens.dictionaries.pursuit.nearest import Nearest, Precision
from atom_lens.dictionaries.pursuit.omp import Codes, lengths, pursue
from atom_lens.errors import AtomLensError

PRECISIONS: list[Precision] = ["full", "bfloat16", "int8"]
EITHER = {"signed": True, "nonnegative": False}


@pytest.mark.parametrize("search", PRECISIONS)
def test_equal_to_scikit_learn(search: Precision) -> None:
    y, units = drawn(1000, 32, 128)
    expected = torch.from_numpy(orthogonal_mp(units.numpy().T, y.numpy().T, n_nonzero_coefs=6).T.copy())
    torch.testing.assert_close(pursue(y, units, most=6, search=search, **EITHER).dense(128), expected)
    codes = pursue(y.float(), units.float(), most=6, search=search, **EITHER)
    assert codes.values.dtype == torch.float32
    alike = ((codes.dense(128) != 0) == (expected != 0)).all(dim=1)
    assert alike.double().mean() > 0.995, "float32 may decide a tie otherwise, and no more"
    torch.testing.assert_close(codes.dense(128)[alike].double(), expected[alike], atol=1e-4, rtol=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    d=st.integers(1, 9),
    f=st.integers(1, 24),
    most=st.integers(1, 12),
    level=st.sampled_from([0.0, 0.2, 0.6, 1.5]),
    per_atom=st.booleans(),
    kind=st.sampled_from(["signed", "free", "nonnegative"]),
    prune=st.booleans(),
    search=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 10_000),
)
def test_equal_to_the_reference(
    d: int, f: int, most: int, level: float, per_atom: bool, kind: str, prune: bool, search: Precision, seed: int
) -> None:
    y, units = drawn(5, d, f, seed)
    generator = torch.Generator().manual_seed(seed)
    tau = level * 2 * torch.rand(f, generator=generator, dtype=torch.float64) if per_atom else level
    options: dict[str, Any] = {"signed": kind == "signed", "nonnegative": kind == "nonnegative", "prune": prune}
    codes = pursue(y, units, most=most, tau=tau, search=search, **options)
    taus = np.broadcast_to(np.asarray(tau), (f,))
    checked = 0
    for row, code in zip(y.numpy(), codes.dense(f).numpy(), strict=True):
        expected, closest = reference(row, units.numpy(), most, taus, **options)
        if closest > 1e-7:  # nearer than that, rounding may decide
            np.testing.assert_allclose(code, expected, atol=1e-6)
            checked += 1
    assume(checked)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(2, 20),
    f=st.integers(1, 60),
    most=st.integers(1, 10),
    tau=st.floats(0, 1.5),
    nonnegative=st.booleans(),
    search=st.sampled_from(PRECISIONS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_what_codes_satisfy(
    d: int, f: int, most: int, tau: float, nonnegative: bool, search: Precision, dtype: torch.dtype, seed: int
) -> None:
    y, units = drawn(7, d, f, seed, dtype)
    codes = pursue(y, units, most=most, tau=tau, nonnegative=nonnegative, search=search)
    taken = torch.arange(most) < codes.count[:, None]
    assert (codes.values[~taken] == 0).all() and (codes.support[~taken] == 0).all()
    for i in range(len(y)):
        chosen = codes.support[i][taken[i]].tolist()
        assert len(set(chosen)) == len(chosen)
    if nonnegative:
        assert (codes.values >= 0).all()
    # Least squares: what is left over is orthogonal to what was chosen.
    left = y - codes.dense(f) @ units
    correlation = left @ units.T
    far = float(y.norm(dim=1).max())
    orthogonal, stop = (1e-3 * far, 1e-2 * far) if dtype == torch.float32 else (1e-9 * far, 2e-4 * far)
    own = correlation.gather(1, codes.support)[taken]
    assert not len(own) or own.abs().max() < orthogonal
    # A row stops for a reason: none is left to choose, or the rounds are over, or nothing new is outside the span.
    best = correlation.scatter(1, codes.support, -torch.inf).amax(dim=1)
    early = codes.count < min(most, d, f)
    assert (best[early & (codes.count == 0)] <= tau + stop).all()
    if not nonnegative:
        assert (best[early] <= tau + stop).all()
    # Never worse than none at all.
    assert (left.norm(dim=1) <= y.norm(dim=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("search", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_searches_find_the_same_atom(search: Precision, dtype: torch.dtype) -> None:
    """Some coordinates are far larger than others, which is hard on few bits; atoms barred; thresholds by atom."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(2, -3, 72, dtype=torch.float64)
    units = normalize(torch.randn(500, 72, generator=generator, dtype=torch.float64) * scale).to(dtype)
    rows = (torch.randn(200, 72, generator=generator, dtype=torch.float64) * scale).to(dtype)
    least = torch.full((200,), 1e-3, dtype=dtype)
    tau = torch.rand(500, generator=generator, dtype=torch.float64).to(dtype) * 100
    exact = rows @ units.T
    barred = exact.topk(3, dim=1).indices
    for signed in (False, True):
        for some in (None, tau):
            for out in (barred, barred[:, :0]):
                found = Nearest(units, search)(rows, out, least, some, signed)
                strength = (exact.abs() if signed else exact).clone().scatter_(1, out, -torch.inf)
                if some is not None:
                    strength[strength < some] = -torch.inf
                best, atom = strength.max(dim=1)
                none = best < least
                assert torch.equal(found.atom[none], torch.full_like(found.atom[none], -1))
                # Which of two that are equal in float32 comes first is open.
                ties = (strength.gather(1, found.atom.clamp(min=0)[:, None])[:, 0] - best).abs() < 1e-5 * best.abs()
                assert ((found.atom == atom) | none | ties).all()
                expected = exact.gather(1, found.atom.clamp(min=0)[:, None])[:, 0]
                torch.testing.assert_close(found.value[~none], expected[~none], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("search", PRECISIONS)
def test_order_of_atoms_and_of_rows_does_not_matter(search: Precision) -> None:
    y, units = drawn(50, 12, 90)
    tau = torch.linspace(0.1, 1.0, 90, dtype=torch.float64)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    codes = pursue(y, units, most=5, tau=tau, search=search).dense(90)
    moved = pursue(y, units[order], most=5, tau=tau[order], search=search).dense(90)
    torch.testing.assert_close(moved, codes[:, order])
    torch.testing.assert_close(pursue(y.flip(0), units, most=5, tau=tau, search=search).dense(90), codes.flip(0))
    alone = torch.cat([pursue(row[None], units, most=5, tau=tau, search=search).dense(90) for row in y])
    torch.testing.assert_close(alone, codes)


def test_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    y, units = drawn(50, 12, 90)
    codes = pursue(y, units, most=5, tau=0.3)
    monkeypatch.setitem(omp._AT_ONCE, "cpu", 90 * 7)
    for one, two in zip(vars(codes).values(), vars(pursue(y, units, most=5, tau=0.3)).values(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("search", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies(search: Precision, dtype: torch.dtype) -> None:
    """Of copies one joins; the error is what it is without them; a copy that is a bit off neither crashes nor harms."""
    y, units = drawn(40, 16, 30, dtype=dtype)
    noise = torch.randn(30, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    alone = pursue(y, units, most=10, search=search)
    left = (y - alone.dense(30) @ units).norm(dim=1)
    for off in (0.0, 1e-7, 1e-5):
        both = normalize(torch.cat([units, units + off * noise]))
        codes = pursue(y, both, most=10, search=search)
        assert torch.isfinite(codes.values).all()
        dense = codes.dense(60)
        torch.testing.assert_close((y - dense @ both).norm(dim=1), left, rtol=1e-2, atol=1e-2)
        if off == 0:
            assert ((dense[:, :30] != 0) & (dense[:, 30:] != 0)).sum() == 0
    one = units[:1].expand(7, -1).contiguous()
    assert pursue(y, one, most=4, search=search, **EITHER).count.max() == 1


@pytest.mark.parametrize("search", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_few_rows_and_many_rounds(search: Precision, dtype: torch.dtype) -> None:
    y, units = drawn(9, 6, 40, dtype=dtype)
    y[3] = 0
    codes = pursue(y, units, most=20, search=search, **EITHER)
    assert codes.count[3] == 0 and not codes.values[3].any()
    assert codes.count.max() == 6, "no more than the width can be independent"
    torch.testing.assert_close(codes.dense(40) @ units, y, rtol=1e-3, atol=2e-3)
    empty = pursue(y[:0], units, most=3, search=search)
    assert empty.support.shape == empty.values.shape == (0, 3) and empty.dense(40).shape == (0, 40)
    # Tiny and huge rows are rows as well.
    scaled = pursue(torch.cat([y * 1e-12, y * 1e12]), units, most=3, search=search)
    plain = pursue(y, units, most=3, search=search)
    assert torch.equal(scaled.support, torch.cat([plain.support] * 2))
    torch.testing.assert_close(scaled.values[9:] / 1e12, plain.values, rtol=1e-3, atol=1e-4)


def test_two_runs_are_equal() -> None:
    y, units = drawn(700, 24, 200, dtype=torch.float32)
    one, two = (pursue(y, units, most=6, tau=0.2, prune=True) for _ in range(2))
    for first, second in zip(vars(one).values(), vars(two).values(), strict=True):
        assert torch.equal(first, second)


def test_pruning_and_non_negative_fits_lower_what_they_are_for() -> None:
    """|r|² + sum tau² with pruning is at most that without; coefficients that would be negative do occur here."""
    y, units = drawn(400, 16, 120)
    tau = 0.5

    def cost(codes: Codes) -> torch.Tensor:
        return (y - codes.dense(120) @ units).square().sum(1) + tau**2 * codes.count

    for nonnegative in (False, True):
        options: dict[str, Any] = {"most": 10, "tau": tau, "nonnegative": nonnegative}
        before, after = (pursue(y, units, prune=prune, **options) for prune in (False, True))
        assert (cost(after) <= cost(before) + 1e-9).all() and (after.count < before.count).any()
    free = pursue(y, units, most=10, tau=tau, nonnegative=False)
    assert (free.values < 0).any()
    # Non-negative least squares over the atoms that stay: those that left would come back with a negative sign.
    held = pursue(y, units, most=10, tau=tau)
    left = y - held.dense(120) @ units
    assert (left.norm(dim=1) <= y.norm(dim=1)).all() and (held.count < free.count).any()


@pytest.mark.parametrize("options", [{}, {"tau": 0.4}, {"tau": 0.4, "prune": True}, EITHER])
def test_gradient_at_fixed_codes_is_that_of_the_loss(options: dict[str, Any]) -> None:
    """Envelope theorem: against finite differences of the loss, the pursuit run again for each."""
    y, start = drawn(6, 10, 14)

    def run(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = pursue(y, units, most=3, **options)
        return (y - codes.dense(14) @ units).square().sum(), codes.support

    units = start.clone().requires_grad_()
    codes = pursue(y, units, most=3, **options)
    assert not codes.values.requires_grad
    (y - codes.dense(14) @ units).square().sum().backward()
    assert units.grad is not None
    compared, step = 0, 1e-5
    for atom in range(14):
        for column in range(10):
            # Along the sphere: atoms have norm 1, and the loss does not depend on their length.
            off = torch.zeros_like(start)
            off[atom, column] = 1
            off[atom] -= start[atom, column] * start[atom]
            (high, one), (low, two) = (run(normalize(start + sign * step * off)) for sign in (1, -1))
            if torch.equal(one, codes.support) and torch.equal(two, codes.support):
                slope = (units.grad * off).sum().item()
                assert (high - low).item() / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7)
                compared += slope != 0
    assert compared > 50


def test_a_search_made_once() -> None:
    """For any number of rows, and of atoms that lie in memory as they like."""
    y, units = drawn(40, 16, 100, dtype=torch.float32)
    units = units.T.contiguous().T
    for precision in PRECISIONS:
        nearest = Nearest(units, precision)
        for rows in (3, 40, 17):
            found = pursue(y[:rows], units, most=4, search=nearest)
            assert torch.equal(found.support, pursue(y[:rows], units, most=4, search="full").support)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"most": 0}, "most is 0, allowed is at least 1"),
        ({"tau": -0.1}, "tau is negative or NaN"),
        ({"tau": float("nan")}, "tau is negative or NaN"),
        ({"tau": torch.ones(3)}, r"tau has shape \(3,\), allowed is a number or shape \(8,\)"),
        ({"signed": True}, "signed is True with nonnegative True"),
        ({"units": torch.ones(8, 3)}, r"units have shape \(8, 3\), allowed is \(F, 4\)"),
        ({"units": torch.ones(0, 4)}, "with F at least 1"),
        ({"units": torch.ones(8, 4, dtype=torch.double)}, "y is torch.float32 and units are torch.float64"),
        ({"units": torch.ones(8, 4)}, "units has norm 2 in row 0, allowed are rows of norm 1"),
        ({"units": torch.full((8, 4), torch.nan)}, "units has norm nan in row 0"),
        ({"y": torch.full((2, 4), torch.nan)}, "y has rows with NaN or infinite values"),
        ({"search": Nearest(torch.full((8, 4), 0.5), "full")}, "made for other atoms"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"y": torch.ones(2, 4), "units": normalize(torch.ones(8, 4)), "most": 2} | change
    with pytest.raises(AtomLensError, match=message):
        # Shapes are the business of the type checker in tests, and of this function elsewhere.
        inspect.unwrap(pursue)(given.pop("y"), given.pop("units"), **given)


@pytest.mark.parametrize("search", PRECISIONS)
def test_lengths_at_every_threshold(search: Precision) -> None:
    """One pursuit tells what a pursuit at each threshold finds, rows included whose atoms leave again."""
    y, units = drawn(400, 12, 60, dtype=torch.float32)[:2]
    units = torch.nn.functional.normalize(units + 0.7 * units[:1], dim=1)  # alike, so that coefficients turn negative
    nearest = Nearest(units, search)
    seen = lengths(y, units, most=9, search=nearest)
    longest = pursue(y, units, most=9, search=nearest).count
    assert torch.equal(seen.at(0.0), longest) and bool((seen.count.cummax(dim=1).values > seen.count).any())
    for tau in (0.01, 0.1, 0.3, 0.5, 0.8, 1.5, 1e3):
        found = pursue(y, units, most=9, tau=tau, search=nearest).count
        tie = ((seen.correlation - tau).abs() < 1e-5).any(dim=1)
        assert torch.equal(seen.at(tau)[~tie], found[~tie]) and int(tie.sum()) < 5, tau
    assert seen.at(1e3).sum() == 0
