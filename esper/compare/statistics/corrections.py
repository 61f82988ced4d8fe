"""Corrections and summaries: Holm, interquartile mean, probability of improvement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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


def holm_levels(p_values: Array, adjusted: Array, alpha: float) -> Array:
    """The level at which Holm's procedure tests each comparison, ``[comparisons]``, from its p-values and the adjusted ones.

    The first is tested at α/k, and every rejection leaves the others its share. What is not rejected stays at the level at which the
    procedure stopped. An interval of confidence 1 − level excludes 0 exactly where the comparison is rejected.
    """
    order = np.lexsort((p_values, adjusted))
    places = np.minimum(np.argsort(order), int((adjusted <= alpha).sum()))
    return np.divide(alpha, np.maximum(len(order) - places, 1))


def iqm(values: Array) -> float:
    """Interquartile mean: the mean of the middle half (Agarwal et al. 2021)."""
    from scipy import stats

    return float(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25))


def probability_of_improvement(differences: Array, error: Array) -> float:
    """Chance that an arm beats the other with the same seed: the share of pairs in which it does, equal ones counting half.

    Args:
        differences: ``[pairs]``, positive where the arm is better.
        error: how far rounding may have moved each.
    """
    sure = np.where(np.abs(differences) > error, np.sign(differences), 0.0)
    return float(np.mean(sure + 1) / 2)
