"""Looking at a sweep before it is finished without raising the chance of a false "better".

A group-sequential sign-flip test: each look may spend part of α (Lan & DeMets 1983), and its boundary is found among
the sign patterns themselves: a pattern "crosses" at a look if it is among the most extreme that the spending allows
there, patterns that crossed before counted in. The observed data are one pattern of the set, so the error rate is
exact for every distribution. Holm over the arms stays valid because the boundaries grow with the level
(Maurer & Bretz 2013).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.sign_flip import FLIPS, Signs, sign_patterns, sum_error, sums

Array = NDArray[np.float64]
NEARLY = 1e-9  # how near below a whole number of patterns still is that number
LEVELS, HALVINGS = 16, 10  # levels tried from below, and how often the interval between two of them is halved


def look_pairs(pairs: int, looks: int, fewest: int) -> list[int]:
    """After how many pairs to look: evenly spaced, none before ``fewest``, the last at ``pairs``."""
    planned = {max(round(pairs * (i + 1) / looks), min(fewest, pairs)) for i in range(looks)}
    return sorted(planned | {pairs})


def spent_alpha(fraction: float, level: float) -> float:
    """α spent by this fraction of the pairs, of the kind of O'Brien and Fleming: little early, all of it at 1."""
    from scipy import special

    return float(2 * special.ndtr(special.ndtri(level / 2) / np.sqrt(fraction)))


def crossing_look(
    differences: Array,
    looks: list[int],
    pairs: int,
    level: float,
    *,
    error: Array | None = None,
    flips: int = FLIPS,
    rng: np.random.Generator | None = None,
) -> NDArray[np.int64]:
    """The index of the look at which each data set crosses its boundary, −1 where none did; shape ``[sets]``.

    ``differences`` is ``[pairs so far, sets]``; looks beyond the pairs so far are not taken. ``pairs`` is the planned
    number, which fixes the sign patterns so that a look taken live and the same look taken later agree. ``error`` as in
    :func:`~esper.compare.statistics.sign_flip.sign_flip`.
    """
    data = np.asarray(differences, dtype=np.float64)
    data = data.reshape(len(data), -1)
    off = np.broadcast_to(sum_error(data, error), data.shape)
    signs = sign_patterns(pairs, flips, rng)
    step = max(2_000_000 // len(signs), 1)
    pieces = [slice(at, at + step) for at in range(0, data.shape[1], step)]
    return np.concatenate([_crossings(data[:, at], off[:, at], looks, pairs, level, signs) for at in pieces])


def _crossings(data: Array, off: Array, looks: list[int], pairs: int, level: float, signs: Signs) -> NDArray[np.int64]:
    crossed = np.zeros((len(signs), data.shape[1]), dtype=bool)
    first = np.full(data.shape[1], -1, dtype=np.int64)
    for look, count in enumerate(looks):
        if count > len(data):
            break
        allowed = int(np.floor(spent_alpha(count / pairs, level) * len(signs) + NEARLY))
        if allowed < 1:
            continue
        far = np.abs(sums(signs[:, :count], data[:count]))
        far[crossed] = np.inf
        # strictly above the first value that may not cross: ties at the boundary stay inside, on the safe side
        bound = np.partition(far, len(signs) - allowed - 1, axis=0)[len(signs) - allowed - 1]
        crossed |= far > bound + 2 * off[:count].sum(axis=0)
        first[(first < 0) & crossed[0]] = look
    return first


def sequential_p(differences: Array, looks: list[int], pairs: int, *, error: Array | None = None, flips: int = FLIPS) -> Array:
    """P-values that count the looks, shape ``[sets]``: the smallest level at which a set has crossed by now, 1 where none is.

    They stand in the place of p-values of one look, which may contradict the decision of the looks (Liu & Anderson 2008). For
    reading, not for deciding: as only whole patterns can be allowed, a look may allow one to a smaller level and not to a
    slightly larger one, so they are exact to a pattern a look.
    """
    data = np.asarray(differences, dtype=np.float64)
    data = data.reshape(len(data), -1)
    off = None if error is None else error.reshape(len(data), -1)
    columns = [(data[:, [at]], None if off is None else off[:, [at]]) for at in range(data.shape[1])]
    return np.array([_smallest_level(*column, looks, pairs, flips) for column in columns])


def _smallest_level(data: Array, error: Array | None, looks: list[int], pairs: int, flips: int) -> float:
    """Found from below: the boundaries grow with the level up to 0.3 and not everywhere beyond."""

    def crosses(level: float) -> bool:
        return bool(crossing_look(data, looks, pairs, level, error=error, flips=flips)[0] >= 0)

    patterns = len(sign_patterns(pairs, flips))
    if patterns < 2:
        return 1.0
    low, high = 0.0, 1.0
    for level in np.geomspace(1 / patterns, 1 - 1 / patterns, LEVELS):
        if crosses(float(level)):
            high = float(level)
            break
        low = float(level)
    else:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if crosses(middle) else (middle, high)
    return high


def sequential_holm(
    differences: Array,
    looks: list[int],
    pairs: int,
    alpha: float,
    *,
    error: Array | None = None,
    flips: int = FLIPS,
    rng: np.random.Generator | None = None,
) -> NDArray[np.bool_]:
    """Which comparisons are decided by now, for ``differences`` of shape ``[pairs so far, comparisons, sets]``.

    Step-down: all are tested at α/k; with every rejection the others gain its share. Returns ``[comparisons, sets]``.
    """
    data = np.asarray(differences, dtype=np.float64)
    _, comparisons, sets = data.shape
    flat = data.reshape(len(data), -1)
    decided = np.zeros((comparisons, sets), dtype=bool)
    for left in range(comparisons, 0, -1):
        here = decided.sum(axis=0) == comparisons - left
        if not here.any():
            continue
        crossed = crossing_look(flat, looks, pairs, alpha / left, error=error, flips=flips, rng=rng) >= 0
        decided |= crossed.reshape(comparisons, sets) & (decided.sum(axis=0) >= comparisons - left)
    return decided
