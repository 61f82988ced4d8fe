"""What a comparison that could not tell would have needed: how many more pairs, for which difference, and how unsure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper.compare.results.plan import Plan
from esper.compare.results.runs import Pairs
from esper.compare.statistics.power import MOST_PAIRS, PILOT_PAIRS, fewest_pairs, needed_pairs


@dataclass(frozen=True)
class Need:
    """``more`` pairs find ``difference`` with the planned power if the spread is the one seen, and so many as ``between`` says at
    the ends of its interval; from ``MOST_PAIRS`` on no number of pairs does."""

    difference: float
    more: int
    between: tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """The spread (standard deviation) of the paired differences with its interval, and what it makes necessary.

    ``fewest`` is the number of pairs below which nothing can be told; with fewer there are no ``rows``, because the spread of so few
    pairs says next to nothing.
    """

    fewest: int
    spread: float
    spread_interval: tuple[float, float]
    rows: tuple[Need, ...]


def needs_of(one: Pairs, plan: Plan) -> Needs:
    """What these pairs lack: for the smallest difference worth having, and for the one seen where that is another question.

    The difference seen is asked for where it is larger, and where the pairs have the power for the smallest one already.
    """
    pairs, fewest = len(one.tested), fewest_pairs(plan.alpha, plan.comparisons)
    spread = float(one.tested.std(ddof=1)) if pairs > 1 else float("nan")
    if pairs < fewest or not spread > 2 * float(one.error.max()):
        return Needs(fewest, spread, (float("nan"), float("nan")), ())
    ends = spread_interval(spread, pairs, plan.alpha)
    seen, rows = abs(float(one.tested.mean())), []
    if plan.minimum_effect > 0:
        rows.append(_need(plan.minimum_effect, one, plan, spread, ends))
    if seen > max(plan.minimum_effect, 2 * float(one.error.max())) or (seen > 0 and not (rows and rows[0].more)):
        rows.append(_need(seen, one, plan, spread, ends))
    return Needs(fewest, spread, ends, tuple(rows))


def spread_interval(spread: float, pairs: int, alpha: float) -> tuple[float, float]:
    """The 1 − α interval of a standard deviation seen in so many pairs, by χ² with one degree of freedom less; exact for normal noise."""
    from scipy import stats

    low, high = (spread * float(np.sqrt((pairs - 1) / stats.chi2.isf(tail, pairs - 1))) for tail in (alpha / 2, 1 - alpha / 2))
    return low, high


def _need(difference: float, one: Pairs, plan: Plan, spread: float, ends: tuple[float, float]) -> Need:
    def more(spread: float, noise: tuple[float, ...] = ()) -> int:
        needed = needed_pairs(difference / spread, plan.power, plan.alpha, plan.comparisons, noise, plan.early)
        return MOST_PAIRS if needed >= MOST_PAIRS else max(needed - len(one.tested), 0)

    shape = tuple(one.tested.tolist()) if len(one.tested) >= PILOT_PAIRS else ()
    found = more(spread, shape)
    least, most = (more(end) for end in ends)  # of normal noise, as these ends are
    return Need(difference, found, (min(least, found), max(most, found)))
