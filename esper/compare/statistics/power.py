"""The pairs that a difference needs, and the difference that a number of pairs finds, after Holm's correction.

Effects are in standard deviations of the paired differences. The level of one comparison among ``k`` is α/k, Holm's
first and strictest step, so the stated power is that of a single real difference among ``k``. ``looks`` says how often
a sequential sweep looks, 0 that it is judged once, at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.random_draws import Noise, simulated_differences
from esper.compare.statistics.sequential import crossing_look, look_pairs
from esper.compare.statistics.sign_flip import EXACT_PAIRS, flips_for, sign_flip

SIMULATED_PAIRS = 12  # up to here, or nearly twice the fewest, few possible p-values make the test weaker than the t-test
SHAPED_PAIRS = 30  # beyond, the mean of any noise is near enough to normal
PILOT_PAIRS = 15  # fewer differences do not tell the shape of their noise
DRAWS, LOOKED_DRAWS = 6_000, 1_000
SUMS = 100_000_000  # sums in one simulation: of many patterns fewer draws are taken
LOOKED_PAIRS = 30  # the cost of looking early is simulated up to here, and hardly changes beyond
ANCHOR = 0.8  # power at which it is simulated
MOST_PAIRS = 1_000_000
Array = NDArray[np.float64]


def fewest_pairs(alpha: float, comparisons: int = 1) -> int:
    """The smallest number of pairs whose smallest two-sided p-value, 2/2ⁿ, reaches α after Holm (6 at 0.05)."""
    return int(np.ceil(np.log2(2 * max(comparisons, 1) / alpha) - 1e-12))


@lru_cache(maxsize=512)
def power(pairs: int, effect: float, alpha: float, comparisons: int = 1, noise: Noise = (), looks: int = 0) -> float:
    """Chance of finding a difference of ``effect`` standard deviations, two-sided.

    Normal noise unless ``noise`` gives paired differences of a pilot, whose shape is then used up to 30 pairs (heavy
    tails make the stated effect easier to find, ties harder). Simulated with the test itself up to 12 pairs, up to
    nearly twice the fewest, and wherever a pilot is used, from the noncentral t distribution elsewhere.
    """
    level, fewest = alpha / max(comparisons, 1), fewest_pairs(alpha, comparisons)
    if pairs < fewest:
        return 0.0
    if looks:
        effect *= retained_effect(pairs, alpha, comparisons, looks)
    if pairs <= max(SIMULATED_PAIRS, 2 * fewest - 4) or (noise and pairs <= SHAPED_PAIRS):
        flips = _flips(level, pairs)
        count = min(DRAWS, SUMS // (2 ** (pairs - 1) if pairs <= EXACT_PAIRS else flips + 1))
        return float(np.mean(sign_flip(simulated_differences(pairs, effect, noise, count), flips=flips) <= level))
    from scipy import special  # scipy.stats has the same functions, and importing it takes half a second longer

    bound, shift = -special.stdtrit(pairs - 1, level / 2), effect * np.sqrt(pairs)
    below, wrong_side = np.nan_to_num(special.nctdtr(pairs - 1, shift, np.array([bound, -bound])))  # NaN where it is next to nothing
    return float(1 - below + wrong_side)


@lru_cache(maxsize=64)
def retained_effect(pairs: int, alpha: float, comparisons: int, looks: int) -> float:
    """The share of an effect that is left when looks spend α on the way: the looks find ``e`` as often as one look finds this share of it.

    Both tests see the same normal draws, at an effect that one look finds with 80 % power, so that the difference
    between them is known to half a point.
    """
    if pairs > LOOKED_PAIRS:
        return retained_effect(LOOKED_PAIRS, alpha, comparisons, looks)
    level, fewest = alpha / max(comparisons, 1), fewest_pairs(alpha, comparisons)
    whole, flips = detectable(pairs, ANCHOR, alpha, comparisons), _flips(level, pairs)
    data = simulated_differences(pairs, whole, (), LOOKED_DRAWS)
    once = np.mean(sign_flip(data, flips=flips) <= level)
    looked = np.mean(crossing_look(data, look_pairs(pairs, looks, fewest), pairs, level, flips=flips) >= 0)
    return min(detectable(pairs, ANCHOR - float(once - looked), alpha, comparisons) / whole, 1.0)


def _flips(level: float, pairs: int) -> int:
    """Random patterns of a simulation: fewer than a verdict takes, as no single p-value matters."""
    return min(max(1_999, int(10 / level)), flips_for(level, pairs))


def needed_pairs(effect: float, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = (), looks: int = 0) -> int:
    """The smallest number of pairs with at least the wanted power; ``MOST_PAIRS`` for effects that none could find."""
    fewest = max(fewest_pairs(alpha, comparisons), 2)
    return least_count(lambda pairs: power(pairs, abs(effect), alpha, comparisons, noise, looks) >= wanted, fewest)


def detectable(pairs: int, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = (), looks: int = 0) -> float:
    """The effect in standard deviations that so many pairs find with the wanted power; inf below the fewest pairs."""
    if pairs < fewest_pairs(alpha, comparisons):
        return float("inf")
    return least_effect(lambda effect: power(pairs, effect, alpha, comparisons, noise, looks) >= wanted)


def least_count(enough: Callable[[int], bool], fewest: int) -> int:
    """The smallest count of at least ``fewest`` that is enough; ``MOST_PAIRS`` where none is."""
    low = high = fewest
    while not enough(high):
        low, high = high, high * 2
        if high > MOST_PAIRS:
            return MOST_PAIRS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def least_effect(enough: Callable[[float], bool]) -> float:
    """The smallest effect that is enough, to one part in four thousand."""
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, high * 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class MorePairs:
    """``more`` pairs (unpaired: runs of each arm) find ``difference`` with the planned power if its spread is the one seen.

    ``between`` has the numbers at the two ends of the spread's interval. ``MOST_PAIRS`` stands for "no number of pairs does".
    """

    difference: float
    more: int
    between: tuple[int, int]


@dataclass(frozen=True)
class PairsNeeded:
    """The spread (standard deviation) of the paired differences with its interval, and the pairs that it makes necessary.

    Below ``fewest`` pairs no comparison can be decided. There are no ``rows`` then, because the spread of so few pairs says next to
    nothing. Of unpaired arms it is the spread of the runs inside an arm, and runs of each arm are counted in the place of pairs.
    """

    fewest: int
    spread: float
    spread_interval: tuple[float, float]
    rows: tuple[MorePairs, ...]


def pairs_needed(
    differences: Array, error: Array, minimum_effect: float, wanted: float, alpha: float, comparisons: int = 1, looks: int = 0
) -> PairsNeeded:
    """How many more pairs an undecided comparison needs, for the smallest difference worth having and for the one seen.

    The difference seen has a row where it is larger than the smallest one, and where the pairs have the power for the smallest one already.

    Args:
        differences: ``[pairs]``, with the ``error`` by which rounding may have moved each.
        minimum_effect: the smallest difference worth having, in the metric; 0 for none.
        wanted: the power that is asked for. ``alpha``, ``comparisons`` and ``looks`` are those of :func:`power`.
    """
    pairs, fewest, slack = len(differences), fewest_pairs(alpha, comparisons), 2 * float(error.max())
    spread = float(differences.std(ddof=1)) if pairs > 1 else float("nan")
    if pairs < fewest or not spread > slack:
        return PairsNeeded(fewest, spread, (float("nan"), float("nan")), ())
    ends = spread_interval(spread, pairs, alpha)
    shape = tuple(differences.tolist()) if pairs >= PILOT_PAIRS else ()

    def more(difference: float, spread: float, noise: Noise = ()) -> int:
        needed = needed_pairs(difference / spread, wanted, alpha, comparisons, noise, looks)
        return MOST_PAIRS if needed >= MOST_PAIRS else max(needed - pairs, 0)

    def row(difference: float) -> MorePairs:
        found = more(difference, spread, shape)
        least, most = (more(difference, end) for end in ends)  # of normal noise, as these ends are
        return MorePairs(difference, found, (min(least, found), max(most, found)))

    return PairsNeeded(fewest, spread, ends, need_rows(row, abs(float(differences.mean())), minimum_effect, slack))


def need_rows(row: Callable[[float], MorePairs], seen: float, minimum_effect: float, slack: float) -> tuple[MorePairs, ...]:
    """The needs for the smallest difference worth having and for the one seen, each where it tells something."""
    rows = [row(minimum_effect)] if minimum_effect > 0 else []
    if seen > max(minimum_effect, slack) or (seen > 0 and not (rows and rows[0].more)):
        rows.append(row(seen))
    return tuple(rows)


def spread_interval(spread: float, pairs: int, alpha: float) -> tuple[float, float]:
    """The 1 − α interval of a standard deviation seen in so many pairs, by χ² with one degree of freedom less; exact for normal noise."""
    from scipy import special

    low, high = (spread * float(np.sqrt((pairs - 1) / special.chdtri(pairs - 1, tail))) for tail in (alpha / 2, 1 - alpha / 2))
    return low, high
