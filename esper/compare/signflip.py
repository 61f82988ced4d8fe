"""The paired sign-flip test, exact where that is cheap, and the interval that belongs to it.

If the two arms of a pair are exchangeable, every difference could as well have had the other sign. The test compares
the observed sum with the sums under all sign patterns (Fisher 1935), so its error rate holds for any distribution.
Everything works on many data sets at once: differences have shape ``[pairs]`` or ``[pairs, sets]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.draws import generator

EXACT_PAIRS = 15
FLIPS = 9_999
MOST_FLIPS = 999_999
TOLERANCE = 1e-9  # of the sum of absolute differences: equal sums must count as equal whatever the order of addition
CHUNK = 4_000_000  # floats held at once (32 MB)
PATTERNS = 64_000_000  # signs held at once, a byte each

Array = NDArray[np.float64]
Signs = NDArray[np.int8]


def flips_for(level: float, pairs: int) -> int:
    """How many random patterns a decision at ``level`` needs: a hundred for every 1/level, the smallest p being 1/(flips + 1).

    At least 9,999; at most 999,999 and what 64 MB hold.
    """
    return max(FLIPS, min(int(np.ceil(100 / level)) - 1, MOST_FLIPS, PATTERNS // max(pairs, 1)))


def finest_level(pairs: int) -> float:
    """The smallest level at which so many pairs can be judged: ten of the patterns counted must lie beyond it."""
    return 0.0 if pairs <= EXACT_PAIRS else 10 / (flips_for(1 / MOST_FLIPS, pairs) + 1)


def sign_patterns(pairs: int, flips: int = FLIPS, rng: np.random.Generator | None = None) -> Signs:
    """Rows of ±1 of shape ``[patterns, pairs]``; the first row is all +1, the data as observed.

    To 15 pairs: every pattern that starts with +1; their negatives complete the set. Beyond: the observed pattern and
    ``flips`` random ones, whose inclusion is the +1 correction (Phipson & Smyth 2010).
    """
    if rng is None:
        return _known_patterns(pairs, flips)
    return _patterns(pairs, flips, rng)


@lru_cache(maxsize=4)  # an interval asks a hundred times for the same
def _known_patterns(pairs: int, flips: int) -> Signs:
    found = _patterns(pairs, flips, generator("sign flips", pairs))
    found.flags.writeable = False
    return found


def _patterns(pairs: int, flips: int, rng: np.random.Generator) -> Signs:
    if pairs <= EXACT_PAIRS:
        bits = (np.arange(2 ** max(pairs - 1, 0))[:, None] >> np.arange(max(pairs - 1, 0))) & 1
        return np.hstack([np.ones((len(bits), min(pairs, 1))), 1 - 2 * bits]).astype(np.int8)
    signs = np.ones((flips + 1, pairs), dtype=np.int8)
    for part in _rows(flips, pairs):
        signs[1:][part] = 1 - 2 * rng.integers(0, 2, size=(part.stop - part.start, pairs))
    return signs


def _rows(count: int, width: int) -> Iterator[slice]:
    """Pieces of ``count`` rows of ``width`` numbers that are small enough to be held as floats."""
    step = max(CHUNK // max(width, 1), 1)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def sums(signs: Signs, data: Array) -> Array:
    """The sum of ``data`` ``[pairs, sets]`` under every pattern, ``[patterns, sets]``."""
    found = np.empty((len(signs), data.shape[1]))
    for part in _rows(*signs.shape):
        found[part] = signs[part].astype(np.float64) @ data
    return found


def sign_flip(differences: Array, alternative: str = "two-sided", *, flips: int = FLIPS, rng: np.random.Generator | None = None) -> Array:
    """P-values of "the differences are symmetric about 0", shape ``[sets]`` (a scalar array for one set).

    ``alternative`` is ``two-sided``, ``greater`` (mean above 0) or ``less``. No pairs, or all differences zero, give 1.
    """
    assert alternative in ("two-sided", "greater", "less"), alternative
    data = np.asarray(differences, dtype=np.float64)
    if not len(data):
        return np.ones(data.shape[1:])
    columns = data.reshape(len(data), -1)
    columns = -columns if alternative == "less" else columns
    signs = sign_patterns(len(columns), flips, rng)
    step = max(CHUNK // len(signs), 1)
    parts = [_tail(signs, columns[:, at : at + step], alternative) for at in range(0, columns.shape[1], step)]
    return np.concatenate(parts).reshape(data.shape[1:])


def _tail(signs: Signs, columns: Array, alternative: str) -> Array:
    found = sums(signs, columns)
    observed = columns.sum(axis=0)
    slack = TOLERANCE * np.abs(columns).sum(axis=0)
    if alternative == "two-sided":
        return np.mean(np.abs(found) >= np.abs(observed) - slack, axis=0)
    above = np.mean(found >= observed - slack, axis=0)
    if len(columns) > EXACT_PAIRS:
        return above
    return (above + np.mean(-found >= observed - slack, axis=0)) / 2  # the negatives of the listed patterns


def equivalence(differences: Array, margin: float, *, flips: int = FLIPS, rng: np.random.Generator | None = None) -> Array:
    """P-values of two one-sided sign-flip tests (TOST, Schuirmann 1987) of "the mean lies outside ±margin"."""
    data = np.asarray(differences, dtype=np.float64)
    if margin <= 0:
        return np.ones(data.shape[1:])
    lower = sign_flip(data + margin, "greater", flips=flips, rng=rng)
    return np.maximum(lower, sign_flip(data - margin, "less", flips=flips, rng=rng))


def interval(differences: Array, alpha: float) -> tuple[float, float]:
    """The shifts that the two-sided test at ``alpha`` does not reject: an interval that errs as rarely as the test.

    It is of one comparison alone, before Holm. Infinite where so few pairs can reject nothing. Shape of
    ``differences``: ``[pairs]``.
    """
    data = np.asarray(differences, dtype=np.float64)
    flips = flips_for(10 * alpha, len(data))  # ten patterns beyond an end place it well enough
    centre, reach = float(data.mean()), float(np.ptp(data))
    if reach <= TOLERANCE * abs(centre):  # equal differences: any other shift is rejected, if anything can be
        return (centre, centre) if 2.0 ** (1 - len(data)) <= alpha else (-np.inf, np.inf)
    return invert(lambda shift: float(sign_flip(data - shift, flips=flips)), centre, reach, alpha)


def invert(p_value: Callable[[float], float], centre: float, reach: float, alpha: float) -> tuple[float, float]:
    """The ends of the set of values around ``centre`` whose p-value exceeds ``alpha``; ±inf where it has no end."""

    def end(side: int) -> float:
        inside, outside = centre, centre + side * reach
        for _ in range(20):
            if p_value(outside) <= alpha:
                break
            inside, outside = outside, centre + 2 * (outside - centre)
        else:
            return side * np.inf
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if p_value(middle) > alpha else (inside, middle)
        return outside

    return end(-1), end(+1)
