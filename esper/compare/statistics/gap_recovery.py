"""Gap recovery: how much of the way from the small net to the final one from scratch the grown net went."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.runs import rounding
from esper.compare.statistics.sign_flip import flips_for, interval, invert, sign_flip

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Recovery:
    """``gap`` is in the metric; ``value`` (1 = all of it) and its interval are NaN where the gap may be 0."""

    gap: float
    gap_interval: tuple[float, float]
    value: float
    value_interval: tuple[float, float]

    @property
    def known(self) -> bool:
        """Whether the gap is surely there, so that a share of it means something."""
        return bool(np.isfinite(self.value))


def gap_recovery(small: Array, final: Array, grown: Array, alpha: float = 0.05) -> Recovery:
    """(grown − small) / (final − small) over pairs; all ``[pairs]``, larger is better.

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

    share_ends = invert(p_value, share, 1.0, alpha)
    return Recovery(float(gap.mean()), ends, share, share_ends)
