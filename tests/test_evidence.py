"""Every figure of the report against an independent computation, and by its properties."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import shifted
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from sklearn.metrics import r2_score

from atom_lens import AtomicInnerProduct, evaluate, faithfulness, stability
from atom_lens.dictionaries.nulls import Pursuit, data_atoms, random_atoms
from atom_lens.evidence.bootstrap import intervals
from atom_lens.evidence.measure import measure, observe
from atom_lens.studies.train.show import certificates_text, reading, report_table


def brute_force_q_star(atoms: list[list[int]], l0: list[int], alive: list[bool]) -> float:
    """sup { q : mu_q < 1/(2 K_q - 1) } by exact integer arithmetic, straight from the definition.

    mu_q and K_q are constant between multiples of 1/pairs and 1/n, so one probe between each two suffices.
    """
    living = [a for a, keep in zip(atoms, alive, strict=True) if keep]
    if not living:
        return 0.0

    def dot(u: list[int], v: list[int]) -> int:
        return sum(a * b for a, b in zip(u, v, strict=True))

    squared = sorted(Fraction(dot(u, v) ** 2, dot(u, u) * dot(v, v)) for u, v in combinations(living, 2))
    counts = sorted(l0)
    steps = {Fraction(i, len(counts)) for i in range(len(counts) + 1)}
    steps |= {Fraction(i, len(squared)) for i in range(len(squared) + 1)} if squared else set()
    ordered = sorted(steps)
    best = Fraction(0)
    for low, high in pairwise(ordered):
        q = (low + high) / 2
        k = counts[-(-q * len(counts) // 1) - 1]
        mu_squared = squared[-(-q * len(squared) // 1) - 1] if squared else Fraction(0)
        if k == 0 or mu_squared * (2 * k - 1) ** 2 < 1:
            best = max(best, high)
    return float(best)


@st.composite
def dictionaries(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[bool]]:
    d = draw(st.integers(1, 5))
    # Small entries make orthogonal pairs, duplicates, opposites and exact ties with 1/3 and 1/5 common.
    atom = st.lists(st.integers(-2, 2), min_size=d, max_size=d).filter(any)
    atoms = draw(st.lists(atom, min_size=1, max_size=12))
    if draw(st.booleans()):
        atoms.append(atoms[0])
    l0 = draw(st.lists(st.integers(0, 6), min_size=1, max_size=20))
    alive = draw(st.lists(st.booleans(), min_size=len(atoms), max_size=len(atoms)))
    return atoms, l0, alive


@settings(deadline=None, max_examples=200)
@given(case=dictionaries(), tile=st.integers(1, 8), double=st.booleans())
def test_stability_equals_brute_force(
    case: tuple[list[list[int]], list[int], list[bool]], tile: int, double: bool
) -> None:
    atoms, l0, alive = case
    dtype = torch.float64 if double else torch.float32
    found = stability(torch.tensor(atoms, dtype=dtype), torch.tensor(l0), alive=torch.tensor(alive), tile=tile)
    assert found.q_star == pytest.approx(brute_force_q_star(atoms, l0, alive), abs=1e-12)
    assert found.dead_atoms == alive.count(False)
    assert found.empty_codes == pytest.approx(l0.count(0) / len(l0))


def test_ties_do_not_pass() -> None:
    """Coherence of exactly 1/3 fails K = 2, and two copies of an atom fail K = 1."""
    third = torch.tensor([[1.0, 0, 0], [1.0, 2.0, 2.0]])
    assert stability(third, torch.tensor([2])).q_star == 0.0
    assert stability(third, torch.tensor([1])).q_star == 1.0
    copies = torch.randn(1, 7).repeat(2, 1)
    assert stability(copies, torch.tensor([1])).q_star == 0.0


def test_an_all_dead_dictionary_is_not_stable() -> None:
    found = stability(torch.randn(5, 3), torch.zeros(4, dtype=torch.long), alive=torch.zeros(5, dtype=torch.bool))
    assert (found.q_star, found.empty_codes, found.n_atoms) == (0.0, 1.0, 0)


def test_quantiles_against_numpy(generator: torch.Generator) -> None:
    atoms = torch.randn(90, 20, generator=generator)
    l0 = torch.randint(0, 9, (333,), generator=generator)
    found = stability(atoms, l0, tile=32)
    u = (atoms / atoms.norm(dim=1, keepdim=True)).numpy()
    coherence = np.abs(u @ u.T)[np.triu_indices(90, 1)]
    for q in (0.0, 0.1, 0.5, 0.998, 1.0):
        assert found.coherence_quantile(q) == pytest.approx(np.quantile(coherence, q, method="inverted_cdf"), abs=1e-4)
        assert found.l0_quantile(q) == np.quantile(l0.numpy(), q, method="inverted_cdf")
    assert found.max_coherence == pytest.approx(coherence.max(), abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_stability_sees_directions_only(seed: int) -> None:
    """Order, length and sign of atoms do not matter, and more active atoms never raise q*."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    l0 = torch.randint(0, 5, (40,), generator=generator)
    before = stability(atoms, l0).q_star
    scale = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    moved = (atoms * scale)[torch.randperm(30, generator=generator)]
    assert stability(moved, l0).q_star == before
    assert stability(atoms, l0 + 1).q_star <= before


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_stability_is_intrinsic(seed: int) -> None:
    """x -> A x changes nothing once the metric is estimated again."""
    generator = torch.Generator().manual_seed(seed)
    x = shifted(200, 6, generator).double()
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64) + 3 * torch.eye(6, dtype=torch.float64)
    atoms = torch.randn(25, 6, generator=generator, dtype=torch.float64)
    l0 = torch.randint(1, 4, (50,), generator=generator)
    before = stability(atoms, l0, AtomicInnerProduct.estimate(x, ridge=0.0))
    after = stability(atoms @ a, l0, AtomicInnerProduct.estimate(x @ a, ridge=0.0))
    assert after.q_star == before.q_star
    assert after.max_coherence == pytest.approx(before.max_coherence, abs=1e-6)


@pytest.mark.parametrize(
    ("atoms", "l0", "message"),
    [
        (torch.ones(2, 2), torch.tensor([], dtype=torch.long), "l0 is empty"),
        (torch.ones(2, 2), torch.tensor([-1]), "l0 holds -1"),
        (torch.ones(0, 2), torch.tensor([1]), "atoms is empty"),
        (torch.zeros(2, 2), torch.tensor([1]), "row 0 is zero"),
        (torch.full((2, 2), float("inf")), torch.tensor([1]), "NaN or infinite"),
    ],
)
def test_stability_refuses(atoms: torch.Tensor, l0: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability(atoms, l0)


def test_stability_in_little_memory() -> None:
    """No F x F matrix: at F = 20,000 that alone would be 1.6 GB."""
    script = (
        "import resource, torch\n"
        "from atom_lens.evidence.stability import stability\n"
        "a = torch.randn(20000, 16); l0 = torch.randint(1, 5, (1000,))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s = stability(a, l0)\n"
        "assert s.pairs == 20000 * 19999 // 2\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 0.7


def test_faithfulness_against_scikit_learn(generator: torch.Generator) -> None:
    x = shifted(300, 9, generator).double()
    x_hat = x + 0.3 * torch.randn(300, 9, generator=generator)
    expected = r2_score(x.numpy(), x_hat.numpy(), multioutput="variance_weighted")
    assert faithfulness(x, x_hat) == pytest.approx(expected, abs=1e-9)
    aip = AtomicInnerProduct.estimate(x)
    expected = r2_score(aip.whiten(x).numpy(), aip.whiten(x_hat).numpy(), multioutput="variance_weighted")
    assert faithfulness(x, x_hat, aip) == pytest.approx(expected, abs=1e-9)
    assert faithfulness(x, x) == 1.0
    assert faithfulness(x, x.mean(dim=0, keepdim=True).expand_as(x)) == pytest.approx(0.0, abs=1e-9)


def test_faithfulness_refuses() -> None:
    with pytest.raises(ValueError, match="all 4 rows are the same"):
        faithfulness(torch.ones(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="x_hat has 3 rows, expected 4"):
        faithfulness(torch.randn(4, 2), torch.zeros(3, 2))


def test_nulls_against_scikit_learn(generator: torch.Generator) -> None:
    x = shifted(30, 12, generator)
    null = Pursuit(torch.randn(40, 12, generator=generator), x.mean(dim=0), None, 4)
    y = (x - x.mean(dim=0)).double().numpy()
    reference = orthogonal_mp(null.W_dec.double().numpy().T, y.T, n_nonzero_coefs=4).T
    np.testing.assert_allclose(null.encode(x).numpy(), reference, atol=1e-4)


def test_nulls_survive_copies_of_an_atom(generator: torch.Generator) -> None:
    copies = torch.randn(1, 6, generator=generator).repeat(5, 1)
    codes = Pursuit(copies, torch.zeros(6), None, 3).encode(torch.randn(9, 6, generator=generator))
    assert torch.isfinite(codes).all() and (codes != 0).any(dim=1).all()


def test_data_points_are_perfect_atoms_in_sample(generator: torch.Generator) -> None:
    """The trap the report is built around: capacity = n makes R² = 1 with K = 1, and says nothing."""
    x = shifted(120, 10, generator)
    aip = AtomicInnerProduct.estimate(x)
    mean = x.mean(dim=0)
    found = measure(Pursuit(data_atoms(x, 120, mean, generator), mean, aip, 1), x, aip)
    assert found["r2"] == pytest.approx(1.0, abs=1e-6)
    assert found["l0"]["max"] == 1
    assert found["q_star"] == 1.0


def test_random_atoms_know_nothing(generator: torch.Generator) -> None:
    x = shifted(400, 30, generator)
    aip = AtomicInnerProduct.estimate(x)
    found = measure(Pursuit(random_atoms(60, aip, generator), x.mean(dim=0), aip, 2), x, aip)
    assert found["r2_aip"] < 0.5
    assert found["dead_atoms"] <= 5


def test_report_has_the_documented_fields(generator: torch.Generator) -> None:
    x, heldout = shifted(300, 8, generator).split([200, 100])
    aip = AtomicInnerProduct.estimate(x, source="test")
    atoms = Pursuit(random_atoms(20, aip, generator), x.mean(dim=0), aip, 3)
    report = evaluate(atoms, x, heldout, aip, about={"model": "none", "hook": "none"})
    given, report = report, report.model_dump(mode="json")
    json.dumps(report, allow_nan=False)
    assert given["heldout"]["r2"] == given.heldout.r2 == report["heldout"]["r2"]
    assert report["n"] == 200 and report["d_in"] == 8 and report["d_sae"] == 20
    assert report["n_over_f"] == 10
    assert set(report["metric"]) == {"n", "ridge", "condition", "source"}
    assert set(report["angles"]) == {"euclidean", "aip"}
    fields = {"n", "r2", "r2_aip", "q_star", "l0", "empty_codes", "dead_atoms", "coherence", "interval"}
    for split in ("train", "heldout"):
        assert set(report[split]) == fields and (report[split]["interval"] is None) == (split == "train")
        for null in ("random", "data"):
            found = report["nulls"][null][split]
            assert set(found) == fields | {"r2_euclidean_pursuit", "excess"}
            assert (found["excess"] is None) == (split == "train")
            assert report["nulls"][null][split]["l0"]["max"] == 3
    assert report["train"]["r2_aip"] == pytest.approx(faithfulness(x, atoms.decode(atoms.encode(x)), aip), abs=1e-6)
    shown = report_table(given).text()
    assert "held-out" in shown and f"{report['train']['q_star']:.4f}" in shown
    assert reading(given).startswith("n / F = 10.00: 200 activations for 20 atoms")


def test_evaluate_needs_a_metric(generator: torch.Generator) -> None:
    x = shifted(50, 4, generator)
    atoms = Pursuit(torch.eye(4), x.mean(dim=0), None, 2)
    with pytest.raises(ValueError, match="carry no metric"):
        evaluate(atoms, x)


def test_intervals_against_a_plain_bootstrap(generator: torch.Generator) -> None:
    """Percentiles over resampled subjects, beside a bootstrap written out in numpy; more rows per subject, wider."""
    x = shifted(300, 6, generator)
    aip = AtomicInnerProduct.estimate(x)
    atoms = Pursuit(random_atoms(12, aip, generator), x.mean(dim=0), aip, 2)
    seen = observe(atoms, x, aip)
    groups = [str(i // 10) for i in range(300)]
    found = intervals(seen, groups=groups)
    rng = np.random.default_rng(1)
    residual, total = seen.residual.numpy().reshape(30, 10).sum(1), seen.total.numpy().reshape(30, 10).sum(1)
    draws = rng.integers(0, 30, (4000, 30))
    expected = np.quantile(1 - residual[draws].sum(1) / total[draws].sum(1), [0.025, 0.975])
    np.testing.assert_allclose(found["r2"], expected, atol=0.01)
    for name, (low, high) in found.items():
        assert low <= seen.figures[name] <= high
    assert intervals(seen, seen, groups) == {name: [0.0, 0.0] for name in found}
    same = [str(i // 10) for i in range(300)]
    copies = observe(atoms, x[:30].repeat_interleave(10, dim=0), aip)
    wide, narrow = intervals(copies, groups=same)["r2"], intervals(copies)["r2"]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    with pytest.raises(ValueError, match="groups has 3 rows, expected 300"):
        intervals(seen, groups=["a", "b", "c"])
    with pytest.raises(ValueError, match="at least 2 subjects"):
        intervals(seen, groups=["a"] * 300)


def test_q_star_of_other_codes(generator: torch.Generator) -> None:
    atoms = torch.randn(40, 12, generator=generator)
    l0 = torch.randint(0, 6, (200,), generator=generator)
    found = stability(atoms, l0)
    fewer = l0[torch.randint(0, 200, (50,), generator=generator)]
    assert found.q_star_of(torch.bincount(fewer, minlength=6)) == stability(atoms, fewer).q_star


def test_evidence_says_when_q_star_is_none(generator: torch.Generator) -> None:
    """At one active atom random directions pass, and the reading says so beside the figure."""
    x, heldout = shifted(300, 8, generator).split([200, 100])
    aip = AtomicInnerProduct.estimate(x)
    for k, said in ((1, True), (4, False)):
        atoms = Pursuit(random_atoms(20, aip, generator), x.mean(dim=0), aip, k)
        report = evaluate(atoms, x, heldout, aip)
        assert ("q* is no evidence here" in reading(report)) == said
        assert "codes certified by their own support" in certificates_text(report)
