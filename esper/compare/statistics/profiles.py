"""Several tasks at once: interquartile means and performance profiles with a stratified bootstrap (Agarwal et al. 2021).

The library of that paper, rliable, does not run with pandas 3; these are its definitions. Intervals of a bootstrap are too narrow with
few runs, so they describe, and no verdict rests on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.random_draws import generator

REPEATS, LEVEL, THRESHOLDS = 2_000, 0.95, 41
Array = NDArray[np.float64]


def resampled(blocks: Sequence[Array], repeats: int = REPEATS) -> Array:
    """Runs drawn again with replacement, within every block; shape ``[repeats, runs of all blocks]``."""
    rng = generator("stratified bootstrap", sum(map(len, blocks)))
    return np.concatenate([block[rng.integers(0, len(block), (repeats, len(block)))] for block in blocks], axis=1)


def interquartile_means(rows: Array) -> Array:
    """The mean of the middle half of every row, shape ``[rows]``."""
    outer = rows.shape[1] // 4
    middle: Array = np.sort(rows, axis=1)[:, outer : rows.shape[1] - outer].mean(axis=1)
    return middle


def bounds(values: Array) -> tuple[Array, Array]:
    """The ends of the percentile interval along the first axis."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def thresholds(values: Array) -> Array:
    """Evenly spaced values from the smallest to the largest."""
    return np.linspace(float(values.min()), float(values.max()), THRESHOLDS)


def profile(rows: Array, at: Array) -> Array:
    """The share of a row's runs that is larger than each threshold, shape ``[rows, thresholds]``."""
    ordered = np.sort(rows, axis=1)
    below = np.stack([np.searchsorted(row, at, side="right") for row in ordered])
    share: Array = 1 - below / rows.shape[1]
    return share
