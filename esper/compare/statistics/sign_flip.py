"""The paired sign-flip test, exact where that is cheap, its interval, and the equivalence test made of it.

If the two arms of a pair are exchangeable, every difference could as well have had the other sign. The test compares
the observed sum with the sums under all sign patterns (Fisher 1935), so its error rate holds for any distribution.
Everything works on many data sets at once: differences have shape ``[pairs]`` or ``[pairs, sets]``.

Equal sums must count as equal, and rounding hides that they are: differences of accuracies are multiples of 1/n only nearly. So
every difference may come with its ``error``, how far rounding may have moved it, and two sums are equal where no more than their
errors lies between them. A pattern is compared through the differences that it flips and those that it keeps, each sum with its own
error: with F and K for these sums, ``|K − F| ≥ |K + F|`` where F and K do not have the same sign, and ``K − F ≥ K + F`` where F ≤ 0.
Thus a large difference does not blur the sums of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.random_draws import generator

OPERATIONS = 4  # roundings that a metric may have gone through: a mean, a percentage
EXACT_PAIRS = 15
FLIPS = 9_999
MOST_FLIPS = 999_999
FLIPS_OF_ENDS = 99_999  # an interval tries a hundred shifts; beyond, ten patterns beyond an end place it well enough
EPSILON = float(np.finfo(np.float64).eps)
SURE = 2.0**-40  # twelve digits: the part of a difference that may be off where nothing says how it came about
CHUNK = 4_000_000  # floats held at once (32 MB)
PARTS = 64  # floats that comparing one pattern part by part holds at once, for a dozen pairs
PATTERNS = 64_000_000  # signs held at once, a byte each
Array = NDArray[np.float64]
Signs = NDArray[np.int8]
Indices = NDArray[np.intp]


def flips_for(level: float, pairs: int) -> int:
    """How many random patterns a decision at ``level`` needs: a hundred for every 1/level, the smallest p being 1/(flips + 1).

    At least 9,999; at most 999,999, and at most as many as 64 MB hold.
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


def sum_error(data: Array, error: Array | None) -> Array:
    """How far each number may be off once it is part of a sum of all: its own error, and that of adding; shaped as ``data``.

    ``error`` has the shape of ``data`` or ``[pairs]``; None stands for numbers of which twelve digits are sure.
    """
    size = np.abs(data)
    own = SURE * size if error is None else np.asarray(error, dtype=np.float64).reshape(len(data), -1)
    found: Array = own + (len(data) + 1) * EPSILON * size  # Higham 2002, Accuracy and Stability of Numerical Algorithms, 4.2
    return found


def shifted(data: Array, shift: float | Array, error: Array | None) -> tuple[Array, Array]:
    """``data + shift``, and the errors of these sums."""
    own = SURE * np.abs(data) if error is None else error
    return data + shift, own + EPSILON * (np.abs(data) + np.abs(shift))


def sign_flip(
    differences: Array,
    alternative: str = "two-sided",
    *,
    error: Array | None = None,
    flips: int = FLIPS,
    rng: np.random.Generator | None = None,
    known: Array | None = None,
) -> Array:
    """P-values of "the differences are symmetric about 0", shape ``[sets]`` (a scalar array for one set).

    ``alternative`` is ``two-sided``, ``greater`` (mean above 0) or ``less``; ``error``, shaped as ``differences``, is how far
    rounding may have moved each. No pairs, or all differences zero, give 1. ``known`` are the sums under the patterns, where one
    set's are known already.
    """
    assert alternative in ("two-sided", "greater", "less"), alternative
    data = np.asarray(differences, dtype=np.float64)
    if not len(data):
        return np.ones(data.shape[1:])
    columns = data.reshape(len(data), -1)
    columns = -columns if alternative == "less" else columns
    off = np.broadcast_to(sum_error(columns, error), columns.shape)
    signs = sign_patterns(len(columns), flips, rng)
    if known is not None:
        return _tail(signs, columns, off, alternative, -known if alternative == "less" else known).reshape(data.shape[1:])
    step = max(CHUNK // len(signs), 1)
    pieces = [slice(at, at + step) for at in range(0, columns.shape[1], step)]
    tails = [_tail(signs, columns[:, at], off[:, at], alternative, sums(signs, columns[:, at])) for at in pieces]
    return np.concatenate(tails).reshape(data.shape[1:])


def _tail(signs: Signs, columns: Array, off: Array, alternative: str, found: Array) -> Array:
    """The share of patterns whose sum is at least the observed one; only where the two are near are they compared part by part."""
    observed, slack = columns.sum(axis=0), 2 * off.sum(axis=0)
    if alternative == "two-sided":
        return _share(np.abs(found) - np.abs(observed), slack, lambda *at: _turned(signs, columns, off, *at))
    above = _share(found - observed, slack, lambda *at: _part(signs, columns, off, -1, *at) <= 0)
    if len(columns) > EXACT_PAIRS:
        return above
    below = _share(-found - observed, slack, lambda *at: _part(signs, columns, off, +1, *at) <= 0)
    return np.divide(above + below, 2)  # the negatives of the listed patterns


def _share(beyond: Array, slack: Array, decide: Callable[[Indices, Indices], NDArray[np.bool_]]) -> Array:
    """How often ``beyond`` ``[patterns, sets]`` is not negative; values within the slack are decided by (pattern, set)."""
    found = beyond > slack
    rows, sets = np.nonzero(np.abs(beyond) <= slack)
    step = max(CHUNK // PARTS, 1)
    for at in range(0, len(rows), step):
        some = rows[at : at + step], sets[at : at + step]
        found[some] = decide(*some)
    return np.asarray(found.mean(axis=0))


def _turned(signs: Signs, columns: Array, off: Array, rows: Indices, sets: Indices) -> NDArray[np.bool_]:
    return _part(signs, columns, off, -1, rows, sets) * _part(signs, columns, off, +1, rows, sets) <= 0


def _part(signs: Signs, columns: Array, off: Array, sign: int, rows: Indices, sets: Indices) -> Array:
    """The sign of the sum of those differences that these patterns flip (``sign`` −1) or keep (+1); 0 where its error hides it."""
    taken = signs[rows] == sign
    total = np.where(taken, columns[:, sets].T, 0.0).sum(axis=1)
    found: Array = np.sign(total) * (np.abs(total) > np.where(taken, off[:, sets].T, 0.0).sum(axis=1))
    return found


def equivalence(
    differences: Array, margin: float, *, error: Array | None = None, flips: int = FLIPS, rng: np.random.Generator | None = None
) -> Array:
    """P-values of two one-sided sign-flip tests (TOST, Schuirmann 1987) of "the mean lies outside ±margin"."""
    data = np.asarray(differences, dtype=np.float64)
    if margin <= 0:
        return np.ones(data.shape[1:])
    (above, wrong), (below, _) = (shifted(data, by, error) for by in (margin, -margin))
    lower = sign_flip(above, "greater", error=wrong, flips=flips, rng=rng)
    return np.maximum(lower, sign_flip(below, "less", error=wrong, flips=flips, rng=rng))


def interval(differences: Array, alpha: float, error: Array | None = None) -> tuple[float, float]:
    """The shifts that the two-sided test at ``alpha`` does not reject: an interval that errs as rarely as the test.

    Infinite where so few pairs can reject nothing. Shape of ``differences`` and ``error``: ``[pairs]``.
    """
    return _unrejected(differences, 2.0, alpha, error, ("two-sided", "two-sided"))


def equivalence_interval(differences: Array, alpha: float, error: Array | None = None) -> tuple[float, float]:
    """The shifts that neither one-sided test at ``alpha`` rejects: TOST finds equivalence where it lies within the margin."""
    return _unrejected(differences, 1.0, alpha, error, ("greater", "less"))


def _unrejected(differences: Array, sides: float, alpha: float, error: Array | None, tests: tuple[str, str]) -> tuple[float, float]:
    data = np.asarray(differences, dtype=np.float64)
    flips = max(flips_for(10 * alpha, len(data)), min(flips_for(alpha, len(data)), FLIPS_OF_ENDS))
    centre, reach = float(data.mean()), float(np.ptp(data))
    if reach <= 2 * float(sum_error(data[:, None], error).max()):  # equal differences: any other shift is rejected, if anything can be
        return (centre, centre) if sides * 2.0 ** -len(data) <= alpha else (-np.inf, np.inf)

    signs = sign_patterns(len(data), flips)
    unmoved, balance = sums(signs, data[:, None]), signs.sum(axis=1, dtype=np.float64)[:, None]

    def p_value(shift: float, side: int) -> float:
        moved, wrong = shifted(data, -shift, error)
        if len(data) <= EXACT_PAIRS:
            return float(sign_flip(moved, tests[side > 0], error=wrong, flips=flips))
        wrong = wrong + (len(data) + 1) * EPSILON * (np.abs(data) + abs(shift))  # of moving the sums in the place of the differences
        return float(sign_flip(moved, tests[side > 0], error=wrong, flips=flips, known=unmoved - shift * balance))

    return invert_test(p_value, centre, reach, alpha)


def invert_test(p_value: Callable[[float, int], float], centre: float, reach: float, alpha: float) -> tuple[float, float]:
    """The ends of the set of values around ``centre`` whose p-value exceeds ``alpha``; ±inf where it has no end.

    ``p_value(value, side)`` is asked with −1 for the lower end and +1 for the upper one.
    """

    def end(side: int) -> float:
        inside, outside = centre, centre + side * reach
        for _ in range(20):
            if p_value(outside, side) <= alpha:
                break
            inside, outside = outside, centre + 2 * (outside - centre)
        else:
            return side * np.inf
        for _ in range(40):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if p_value(middle, side) > alpha else (inside, middle)
        return outside

    return end(-1), end(+1)


def rounding(*values: Array) -> Array:
    """How far rounding may have moved a sum or difference of these values, each the result of a few operations."""
    found: Array = OPERATIONS * EPSILON * np.sum([np.abs(value) for value in values], axis=0)
    return found
