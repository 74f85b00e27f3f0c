from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardians.statistics import paired_difference, wilson_interval

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (47, 100), (813, 1000), (1, 10_000)])
def test_wilson_is_its_closed_form(successes, n):
    p = successes / n
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert wilson_interval(successes, n) == pytest.approx((max(centre - half, 0), min(centre + half, 1)), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_fraction(successes, n):
    with pytest.raises(ValueError, match=f"successes={successes}, n={n}"):
        wilson_interval(successes, n)


def outcomes(both, only_a, only_b, neither):
    counts = [both, only_a, only_b, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Newcombe 1998, table II, method 10.
        ((20, 12, 2, 16), (0.2, 0.0562, 0.3292)),
        # Fagerland, Lydersen and Laake, "Statistical analysis of contingency tables", 2017, chapter 8.
        ((1, 1, 7, 12), (-0.286, -0.507, -0.026)),
        ((59, 6, 16, 80), (-0.0621, -0.1186, -0.0046)),
    ],
)
def test_paired_difference_has_the_published_values(table, expected):
    assert paired_difference(*outcomes(*table)) == pytest.approx(expected, abs=5e-4)


def test_paired_difference_covers_the_truth():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.6, 0.15, 0.05, 0.2])
    truth, covered, runs = 0.1, 0, 1000
    for counts in rng.multinomial(60, probabilities, size=runs):
        _, low, high = paired_difference(*outcomes(*counts))
        covered += low <= truth <= high
    assert 0.93 < covered / runs < 0.98


tables = st.tuples(*[st.integers(0, 30)] * 4).filter(any)


@given(tables)
def test_paired_difference_is_antisymmetric_and_ordered(table):
    a, b = outcomes(*table)
    difference, low, high = paired_difference(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert -1 <= low <= difference <= high <= 1
    assert paired_difference(b, a) == pytest.approx((-difference, -high, -low))


def test_equal_outcomes_still_have_an_interval():
    a = np.arange(100) < 60
    difference, low, high = paired_difference(a, a)
    assert difference == 0
    assert -0.1 < low < 0 < high < 0.1


def test_pairing_narrows_the_interval():
    a = np.arange(200) % 2 == 0
    b = a ^ (np.arange(200) < 6)
    shuffled = np.random.default_rng(0).permutation(b)
    _, low, high = paired_difference(a, b)
    _, loose_low, loose_high = paired_difference(a, shuffled)
    assert high - low < 0.5 * (loose_high - loose_low)


def test_paired_difference_refuses_other_outcomes():
    a = np.array([True, False])
    with pytest.raises(TypeError, match="b has dtype int"):
        paired_difference(a, np.array([1, 0]))
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        paired_difference(a, a[:1])
    with pytest.raises(ValueError, match="N >= 1"):
        paired_difference(a[:0], a[:0])
