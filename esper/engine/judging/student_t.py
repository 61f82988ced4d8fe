"""Quantiles of Student's t: torch has none, and a judge with few pairs needs them exact."""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=256)
def quantile(upper_tail: float, dof: int) -> float:
    """The value that a t variable with ``dof`` degrees of freedom exceeds with probability ``upper_tail`` in (0, 0.5].

    By bisection of the tail, ``P(T > t) = ½·I_{v/(v+t²)}(v/2, ½)``, to the last bits of a float.
    """
    assert 0.0 < upper_tail <= 0.5 and dof >= 1, (upper_tail, dof)
    low, high = 0.0, 1.0
    while _tail(high, dof) > upper_tail:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _tail(middle, dof) > upper_tail else (low, middle)
    return high


def _tail(t: float, dof: int) -> float:
    a, b, square = 0.5 * dof, 0.5, t * t
    x, rest = dof / (dof + square), square / (dof + square)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front += a * math.log(x) + (b * math.log(rest) if rest > 0.0 else 0.0)
    if rest == 0.0:
        return 0.5
    if x < (a + 1.0) / (a + b + 2.0):
        return 0.5 * math.exp(front) * _fraction(a, b, x) / a
    return 0.5 * (1.0 - math.exp(front) * _fraction(b, a, rest) / b)


def _fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function by Lentz's method (Abramowitz & Stegun 26.5.8)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (_away(1.0 - (a + b) * x / (a + 1.0), tiny))
    value = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def _away(value: float, tiny: float) -> float:
    return tiny if abs(value) < tiny else value
