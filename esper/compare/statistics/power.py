"""How many pairs a difference needs, and what a number of pairs can find, after Holm's correction.

Effects are in standard deviations of the paired differences. The level of one comparison among ``k`` is α/k, Holm's
first and strictest step, so the stated power is that of a single real difference among ``k``. ``looks`` says how often
a sequential sweep looks, 0 that it is judged once, at its end.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sequential import crossing_look, look_pairs
from esper.compare.statistics.sign_flip import EXACT_PAIRS, flips_for, sign_flip

SIMULATED_PAIRS = 12  # up to here, or nearly twice the fewest, few possible p-values make the test weaker than the t-test
SHAPED_PAIRS = 30  # beyond, the mean of any noise is near enough to normal
PILOT_PAIRS = 15  # fewer differences do not tell the shape of their noise
DRAWS, LOOKED_DRAWS = 6_000, 1_000
SUMS = 100_000_000  # sums in one simulation: of many patterns fewer draws are taken
LOOKED_PAIRS = 30  # what looking early costs is simulated up to here, and hardly changes beyond
ANCHOR = 0.8  # power at which it is simulated
MOST_PAIRS = 1_000_000
Noise = tuple[float, ...]


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
        effect *= kept(pairs, alpha, comparisons, looks)
    if pairs <= max(SIMULATED_PAIRS, 2 * fewest - 4) or (noise and pairs <= SHAPED_PAIRS):
        flips = _flips(level, pairs)
        count = min(DRAWS, SUMS // (2 ** (pairs - 1) if pairs <= EXACT_PAIRS else flips + 1))
        return float(np.mean(sign_flip(_draws(pairs, effect, noise, count), flips=flips) <= level))
    from scipy import stats

    bound, shift = stats.t.isf(level / 2, pairs - 1), effect * np.sqrt(pairs)
    wrong_side = np.nan_to_num(stats.nct.cdf(-bound, pairs - 1, shift))  # scipy gives NaN where it is next to nothing
    return float(stats.nct.sf(bound, pairs - 1, shift) + wrong_side)


@lru_cache(maxsize=64)
def kept(pairs: int, alpha: float, comparisons: int, looks: int) -> float:
    """What is left of an effect when looks spend α on the way: they find ``e`` as often as one look finds ``kept · e``.

    Both tests see the same normal draws, at an effect that one look finds with 80 % power, so that the difference
    between them is known to half a point.
    """
    if pairs > LOOKED_PAIRS:
        return kept(LOOKED_PAIRS, alpha, comparisons, looks)
    level, fewest = alpha / max(comparisons, 1), fewest_pairs(alpha, comparisons)
    whole, flips = detectable(pairs, ANCHOR, alpha, comparisons), _flips(level, pairs)
    data = _draws(pairs, whole, (), LOOKED_DRAWS)
    once = np.mean(sign_flip(data, flips=flips) <= level)
    looked = np.mean(crossing_look(data, look_pairs(pairs, looks, fewest), pairs, level, flips=flips) >= 0)
    return min(detectable(pairs, ANCHOR - float(once - looked), alpha, comparisons) / whole, 1.0)


def _flips(level: float, pairs: int) -> int:
    """Random patterns of a simulation: fewer than a verdict takes, as no single p-value matters."""
    return min(max(1_999, int(10 / level)), flips_for(level, pairs))


def _draws(pairs: int, effect: float, noise: Noise, count: int) -> NDArray[np.float64]:
    """Differences of mean ``effect`` and unit spread, ``[pairs, count]``: normal, or the pilot's with random signs.

    A pilot's accuracies on n samples differ by multiples of 1/n, and so do those of the sweep that it stands for: equal
    differences and zeros make the test weaker, so they are kept and the effect is rounded up or down by lot.
    """
    rng, shape = generator("power", pairs), (pairs, count)
    if not noise:
        return rng.standard_normal(shape) + effect
    values = centred(np.asarray(noise))
    spread, step = values.std(), lattice(values)
    if not step:
        return np.divide(rng.choice(values, shape) * rng.choice((-1.0, 1.0), shape) + effect * spread, spread)
    shift = np.floor(effect * spread / step + rng.random(shape))
    whole = np.round(rng.choice(values, shape) / step) * rng.choice((-1.0, 1.0), shape) + shift  # so that ties stay ties
    return np.multiply(whole, step / spread)


def centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values around their mean; around the step next to it where they are multiples of one."""
    step = lattice(values)
    return values - (step * np.round(values.mean() / step) if step else values.mean())


def lattice(values: NDArray[np.float64]) -> float:
    """The step of which all values are multiples, 0.0 where there is none."""
    sizes = np.unique(np.abs(values)) if len(values) else np.zeros(1)
    gaps = np.diff(sizes, prepend=0.0)
    real = gaps[gaps > 1e-6 * sizes[-1]]
    if not len(real):
        return 0.0
    parts = values / real.min()
    return float(real.min()) if np.abs(parts - np.round(parts)).max() < 1e-3 else 0.0


def needed_pairs(effect: float, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = (), looks: int = 0) -> int:
    """The smallest number of pairs with at least the wanted power; ``MOST_PAIRS`` for effects that none could find."""
    low = max(fewest_pairs(alpha, comparisons), 2)
    high = low
    while power(high, abs(effect), alpha, comparisons, noise, looks) < wanted:
        low, high = high, high * 2
        if high > MOST_PAIRS:
            return MOST_PAIRS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, abs(effect), alpha, comparisons, noise, looks) >= wanted else (middle, high)
    return high


def detectable(pairs: int, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = (), looks: int = 0) -> float:
    """The effect in standard deviations that so many pairs find with the wanted power; inf below the fewest pairs."""
    if pairs < fewest_pairs(alpha, comparisons):
        return float("inf")
    low, high = 0.0, 1.0
    while power(pairs, high, alpha, comparisons, noise, looks) < wanted:
        low, high = high, high * 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if power(pairs, middle, alpha, comparisons, noise, looks) >= wanted else (middle, high)
    return high
