"""Corrections and summaries: Holm, BCa interval, interquartile mean, probability of improvement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.compare.draws import generator

Array = NDArray[np.float64]


def holm(p_values: Array) -> Array:
    """Holm's adjusted p-values (1979) along the first axis, shape ``[comparisons, ...]``; reject where ≤ α."""
    p = np.asarray(p_values, dtype=np.float64)
    if not len(p):
        return p
    order = np.argsort(p, axis=0, kind="stable")
    factors = np.arange(len(p), 0, -1.0).reshape((-1,) + (1,) * (p.ndim - 1))
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, axis=0) * factors, axis=0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), axis=0)
    return adjusted


def bca_interval(values: Array, confidence: float = 0.95, resamples: int = 4_999) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), for pictures alone.

    At 3–8 pairs it misses the truth in 15–26 % of cases, so nothing is decided by it. Equal values give a point;
    fewer than two values give NaN.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) <= 1e-12 * max(np.abs(values).max(), 1.0):
        return float(values[0]), float(values[0])
    rng = generator("bootstrap", len(values))
    found = stats.bootstrap((values,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def iqm(values: Array) -> float:
    """Interquartile mean: the mean of the middle half (Agarwal et al. 2021)."""
    from scipy import stats

    return float(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25))


def probability_of_improvement(better: Array, worse: Array) -> float:
    """Chance that a run of the first arm beats a run of the second, ties counting half (Agarwal et al. 2021)."""
    first, second = np.asarray(better, dtype=np.float64)[:, None], np.asarray(worse, dtype=np.float64)[None, :]
    return float(np.mean((first > second) + 0.5 * (first == second)))
