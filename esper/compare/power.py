"""How many pairs a difference needs, and what a number of pairs can find, after Holm's correction.

Effects are in standard deviations of the paired differences. The level of one comparison among ``k`` is α/k, Holm's
first and strictest step, so the stated power is that of a single real difference among ``k``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.draws import generator
from esper.compare.signflip import sign_flip

SIMULATED_PAIRS = 12  # up to here the test's few possible p-values make it weaker than the t-test; beyond they agree
SHAPED_PAIRS = 30  # beyond, the mean of any noise is near enough to normal
DRAWS = 6_000
MOST_PAIRS = 1_000_000
Noise = tuple[float, ...]


def fewest_pairs(alpha: float, comparisons: int = 1) -> int:
    """The smallest number of pairs whose smallest two-sided p-value, 2/2ⁿ, reaches α after Holm (6 at 0.05)."""
    return int(np.ceil(np.log2(2 * max(comparisons, 1) / alpha) - 1e-12))


@lru_cache(maxsize=512)
def power(pairs: int, effect: float, alpha: float, comparisons: int = 1, noise: Noise = ()) -> float:
    """Chance of finding a difference of ``effect`` standard deviations, two-sided.

    Normal noise unless ``noise`` gives paired differences of a pilot, whose shape is then used up to 30 pairs (heavy
    tails make the stated effect easier to find). Simulated with the test itself up to 12 pairs and wherever a pilot
    is used, from the noncentral t distribution elsewhere.
    """
    level = alpha / max(comparisons, 1)
    if pairs < fewest_pairs(alpha, comparisons):
        return 0.0
    if pairs <= SIMULATED_PAIRS or (noise and pairs <= SHAPED_PAIRS):
        return float(np.mean(sign_flip(_draws(pairs, noise) + effect, flips=1_999) <= level))
    from scipy import stats

    bound, shift = stats.t.isf(level / 2, pairs - 1), effect * np.sqrt(pairs)
    return float(stats.nct.sf(bound, pairs - 1, shift) + stats.nct.cdf(-bound, pairs - 1, shift))


def _draws(pairs: int, noise: Noise) -> NDArray[np.float64]:
    """Unit noise, ``[pairs, DRAWS]``: normal, or the pilot's around its mean with random signs."""
    rng = generator("power", pairs)
    if not noise:
        return rng.standard_normal((pairs, DRAWS))
    around = np.asarray(noise) - np.mean(noise)
    return rng.choice(around / around.std(), (pairs, DRAWS)) * rng.choice((-1.0, 1.0), (pairs, DRAWS))


def needed_pairs(effect: float, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = ()) -> int:
    """The smallest number of pairs with at least the wanted power; ``MOST_PAIRS`` for effects that none could find."""
    low = max(fewest_pairs(alpha, comparisons), 2)
    high = low
    while power(high, abs(effect), alpha, comparisons, noise) < wanted:
        low, high = high, high * 2
        if high > MOST_PAIRS:
            return MOST_PAIRS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, abs(effect), alpha, comparisons, noise) >= wanted else (middle, high)
    return high


def detectable(pairs: int, wanted: float, alpha: float, comparisons: int = 1, noise: Noise = ()) -> float:
    """The effect in standard deviations that so many pairs find with the wanted power; inf below the fewest pairs."""
    if pairs < fewest_pairs(alpha, comparisons):
        return float("inf")
    low, high = 0.0, 1.0
    while power(pairs, high, alpha, comparisons, noise) < wanted:
        low, high = high, high * 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if power(pairs, middle, alpha, comparisons, noise) >= wanted else (middle, high)
    return high
