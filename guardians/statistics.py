"""Intervals for fractions of images."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

__all__ = ["paired_difference", "wilson_interval"]


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a fraction (Wilson 1927), without continuity correction.

    Raises:
        ValueError: `n` is below 1, or `successes` is not in [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: needed are n >= 1 and 0 <= successes <= n")
    interval = binomtest(int(successes), int(n)).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(a: ArrayLike, b: ArrayLike) -> tuple[float, float, float]:
    """Fraction of `a` less fraction of `b`, with its 95% interval, for outcomes on the same images.

    The interval combines the Wilson intervals of both fractions, with the correlation of the pairs, and is well
    behaved where the two never or always differ (Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17, 1998, method 10).

    Args:
        a: boolean outcomes (N,).
        b: boolean outcomes (N,) on the same images in the same order.

    Returns:
        The difference and the ends of its interval, in [-1, 1].

    Raises:
        TypeError: an outcome is not boolean.
        ValueError: the shapes are not the same (N,), or N is 0.
    """
    a, b = np.asarray(a), np.asarray(b)
    for name, outcomes in (("a", a), ("b", b)):
        if outcomes.dtype != bool:
            raise TypeError(f"{name} has dtype {outcomes.dtype}: must be bool")
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"a has shape {a.shape}, b has {b.shape}: both must be (N,) with N >= 1")
    n = len(a)
    both, only_a, only_b = (int(np.count_nonzero(pairs)) for pairs in (a & b, a & ~b, ~a & b))
    neither = n - both - only_a - only_b
    difference = (only_a - only_b) / n
    (below_a, above_a), (below_b, above_b) = _arms(both + only_a, n), _arms(both + only_b, n)
    phi = _correlation(both, only_a, only_b, neither)
    low = difference - sqrt(max(below_a**2 - 2 * phi * below_a * above_b + above_b**2, 0))
    high = difference + sqrt(max(below_b**2 - 2 * phi * below_b * above_a + above_a**2, 0))
    return difference, max(low, -1.0), min(high, 1.0)


def _arms(successes: int, n: int) -> tuple[float, float]:
    """How far the Wilson interval reaches below and above the fraction."""
    low, high = wilson_interval(successes, n)
    return successes / n - low, high - successes / n


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Newcombe's phi: that of the 2 x 2 table, with a continuity correction where it is positive."""
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    n = both + only_a + only_b + neither
    covariance = both * neither - only_a * only_b
    return (max(covariance - n / 2, 0) if covariance > 0 else covariance) / sqrt(margins)
