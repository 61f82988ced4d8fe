"""Single numbers about runs and pairs: interquartile mean, probability of improvement, resolution of a metric, gap recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.sign_flip import flips_for, interval, invert_test, rounding, sign_flip

Array = NDArray[np.float64]
COUNTED = 1e-4  # how near whole numbers the values times the samples are where the metric counts samples; float32 may hold them


def iqm(values: Array) -> float:
    """Interquartile mean: the mean of the middle half (Agarwal et al. 2021)."""
    ordered, outer = np.sort(np.asarray(values, dtype=np.float64)), len(values) // 4
    return float(ordered[outer : len(ordered) - outer].mean())


def probability_of_improvement(differences: Array, error: Array) -> float:
    """Chance that an arm beats the other with the same seed: the share of pairs in which it does, equal ones counting half.

    Args:
        differences: ``[pairs]``, positive where the arm is better.
        error: how far rounding may have moved each.
    """
    sure = np.where(np.abs(differences) > error, np.sign(differences), 0.0)
    return float(np.mean(sure + 1) / 2)


def resolution(values: Sequence[float], samples: int) -> float:
    """The smallest change of the metric that the block's test set can show: 1/n where every value is a count of its n samples.

    NaN where it is not, as for a loss, and where n is not known.
    """
    if not samples or not len(values):
        return float("nan")
    counts = np.array(values) * samples
    return 1 / samples if np.abs(counts - np.round(counts)).max() < COUNTED else float("nan")


@dataclass(frozen=True)
class Recovery:
    """``gap`` is in units of the metric; ``value`` (1 is the whole gap) and its interval are NaN where the gap may be 0."""

    gap: float
    gap_interval: tuple[float, float]
    value: float
    value_interval: tuple[float, float]

    @property
    def known(self) -> bool:
        """Whether the gap is surely there, so that a share of it means something."""
        return bool(np.isfinite(self.value))


def gap_recovery(small: Array, final: Array, grown: Array, alpha: float = 0.05) -> Recovery:
    """The share of the gap between a small net and the final one that a grown net closes: (grown − small) / (final − small).

    All arrays are ``[pairs]``; larger is better.

    Given only where the interval of final − small lies above 0: dividing by a gap that may be nothing gives any
    number. The interval of the share holds the r for which grown − small − r·(final − small) may have mean 0
    (Fieller's idea with the sign-flip test).
    """
    small, final, grown = (np.asarray(a, dtype=np.float64) for a in (small, final, grown))
    gap, gain = final - small, grown - small
    ends = interval(gap, alpha, rounding(small, final))
    unknown = float("nan"), (float("nan"), float("nan"))
    if not ends[0] > 0:
        return Recovery(float(gap.mean()), ends, *unknown)
    share = float(gain.mean() / gap.mean())
    flips = flips_for(10 * alpha, len(gap))

    def p_value(r: float, _side: int) -> float:
        return float(sign_flip(gain - r * gap, error=rounding(small, grown, r * small, r * final), flips=flips))

    share_ends = invert_test(p_value, share, 1.0, alpha)
    return Recovery(float(gap.mean()), ends, share, share_ends)
