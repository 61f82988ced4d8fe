"""The permutation test of two groups of runs that are not paired, its interval, and the equivalence test made of it.

If the runs of two arms are exchangeable, every division of them into groups of these sizes was as likely as the one observed. The
test compares the observed statistic with those of all divisions, so its error rate holds for any distribution. The statistic is the
difference of the means over its standard error (Welch's), for which the test stays valid in large groups even where the arms spread
differently (Janssen 1997; Chung & Romano 2013). In groups of equal size it orders the divisions as the plain difference does.

Several blocks are strata: runs are exchanged within a block only, and the difference is the mean of those of the blocks. Everything
works on many data sets at once: data have shape ``[runs]`` or ``[runs, sets]``, the arm's runs of a block before the reference's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import combinations, product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sign_flip import CHUNK, FLIPS, FLIPS_OF_ENDS, SURE, Signs, flips_for, invert_test, sums

EXACT_DIVISIONS = 20_000  # up to so many, every division is counted
TIE = 1e-9  # statistics that differ by less, relatively, are equal
Array = NDArray[np.float64]
Sizes = tuple[tuple[int, int], ...]  # of every block: runs of the arm, runs of the reference


def divisions(sizes: Sizes) -> int:
    """In how many ways the runs of all blocks divide into groups of these sizes."""
    return prod(comb(ours + theirs, ours) for ours, theirs in sizes)


def smallest_p(sizes: Sizes) -> float:
    """The smallest two-sided p-value that groups of these sizes can give: equal groups have a mirror image of every division."""
    return (2 if all(ours == theirs for ours, theirs in sizes) else 1) / divisions(sizes)


def finest_group_level(sizes: Sizes) -> float:
    """The smallest level at which such groups can be judged: ten of the divisions counted must lie beyond it."""
    return 0.0 if divisions(sizes) <= EXACT_DIVISIONS else 10 / (flips_for(1e-9, _total(sizes)) + 1)


def _total(sizes: Sizes) -> int:
    return sum(map(sum, sizes))


def group_patterns(sizes: Sizes, flips: int = FLIPS, rng: np.random.Generator | None = None) -> Signs:
    """Rows of 1 (the arm's) and 0 (the reference's), ``[divisions, runs]``; the first row is the division observed.

    Every division where there are at most 20,000; beyond, the observed one and ``flips`` random ones, whose inclusion is the +1
    correction (Phipson & Smyth 2010).
    """
    return _known_patterns(sizes, flips) if rng is None else _patterns(sizes, flips, rng)


@lru_cache(maxsize=4)  # an interval asks a hundred times for the same
def _known_patterns(sizes: Sizes, flips: int) -> Signs:
    found = _patterns(sizes, flips, generator(f"divisions {sizes}", _total(sizes)))
    found.flags.writeable = False
    return found


def _patterns(sizes: Sizes, flips: int, rng: np.random.Generator) -> Signs:
    if divisions(sizes) <= EXACT_DIVISIONS:
        each = [_every_division(*one) for one in sizes]
        return np.concatenate([np.stack([one[i] for i in at]) for one, at in zip(each, _product_of_rows(each), strict=True)], axis=1)
    observed = [np.repeat(np.array([1, 0], dtype=np.int8), one) for one in sizes]
    shuffled = [rng.permuted(np.tile(one, (flips, 1)), axis=1) for one in observed]
    return np.vstack([np.concatenate(observed), np.concatenate(shuffled, axis=1)])


def _every_division(ours: int, theirs: int) -> Signs:
    chosen = list(combinations(range(ours + theirs), ours))
    rows = np.zeros((len(chosen), ours + theirs), dtype=np.int8)
    np.put_along_axis(rows, np.array(chosen, dtype=np.int64).reshape(len(chosen), ours), 1, axis=1)
    return rows  # in lexicographic order, so that the first is the one observed


def _product_of_rows(each: list[Signs]) -> list[tuple[int, ...]]:
    """For every block, the row that each combination of the blocks' divisions takes."""
    return list(zip(*product(*(range(len(one)) for one in each)), strict=True))


def group_difference(data: Array, sizes: Sizes) -> Array:
    """The mean over the blocks of (mean of the arm − mean of the reference), shape ``[sets]`` or a scalar array."""
    found = [data[one][: sizes[at][0]].mean(axis=0) - data[one][sizes[at][0] :].mean(axis=0) for at, one in enumerate(_blocks(sizes))]
    return np.asarray(np.mean(found, axis=0))


def _blocks(sizes: Sizes) -> Iterator[slice]:
    start = 0
    for one in sizes:
        yield slice(start, start + sum(one))
        start += sum(one)


class _Block:
    """The sums of one block under every division, from which the statistic follows for any shift of the arm's runs.

    With x the values around their mean, P a row of the patterns and g the observed one: the sums of P·x and P·x², and, where runs are
    shifted, of P·g and P·g·x. Shapes ``[divisions, sets]``.
    """

    def __init__(self, patterns: Signs, data: Array, ours: int, theirs: int) -> None:
        self.patterns, self.ours, self.theirs = patterns, ours, theirs
        self.values = data - data.mean(axis=0)  # so that squares lose no digits
        self.size = np.abs(data).max(axis=0)
        self.inside = sums(patterns, self.values)
        self.squares = sums(patterns, self.values**2)

    @cached_property
    def moved(self) -> tuple[Array, Array]:
        """How many of the arm's own runs a division gives to it, ``[divisions, 1]``, and the sum of their values."""
        own = self.patterns[:, : self.ours]
        return own.sum(axis=1, dtype=np.float64)[:, None], sums(own, self.values[: self.ours])

    def parts(self, shift: float) -> tuple[Array, Array]:
        """The difference of the means under every division, and its squared standard error, once the arm's runs are moved."""
        ours, theirs = self.ours, self.theirs
        inside, squares, whole = self.inside, self.squares, (self.values**2).sum(axis=0)
        if shift:
            count, own = self.moved
            centre = shift * ours / (ours + theirs)  # where the mean of the block moves to
            whole = whole + 2 * shift * self.values[:ours].sum(axis=0) + shift**2 * ours - (ours + theirs) * centre**2
            inside = inside + shift * count
            squares = squares + 2 * shift * own + shift**2 * count - 2 * centre * inside + ours * centre**2
            inside = inside - ours * centre
        tiny = SURE * (self.size + abs(shift))
        difference = inside / ours + inside / theirs  # the others of the block sum to its negative
        difference = np.where(np.abs(difference) > tiny, difference, 0.0)
        if min(ours, theirs) < 2:
            return difference, np.zeros_like(difference)
        first = np.maximum(squares - inside**2 / ours, 0.0) / (ours * (ours - 1))
        second = np.maximum(whole - squares - inside**2 / theirs, 0.0) / (theirs * (theirs - 1))
        none = SURE * (np.abs(self.values).max(axis=0) + abs(shift)) ** 2  # what rounding leaves of squares that cancel
        return difference, np.where(first + second > none, first + second, 0.0)


def _blocks_of(patterns: Signs, data: Array, sizes: Sizes) -> list[_Block]:
    return [_Block(patterns[:, one], data[one], *size) for one, size in zip(_blocks(sizes), sizes, strict=True)]


def _statistics(blocks: list[_Block], shift: float = 0.0) -> Array:
    """Welch's statistic of every division, ``[divisions, sets]``; the plain difference where a group has a single run."""
    parts = [one.parts(shift) for one in blocks]
    difference, variance = (np.sum([part[at] for part in parts], axis=0) for at in (0, 1))
    if any(min(one.ours, one.theirs) < 2 for one in blocks):
        return np.asarray(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.sqrt(variance))


def _tail(statistics: Array, alternative: str) -> Array:
    """The share of divisions whose statistic is at least the observed one, shape ``[sets]``."""
    found = {"two-sided": np.abs, "greater": np.positive, "less": np.negative}[alternative](statistics)
    observed = found[0]
    finite = np.where(np.isfinite(observed), np.abs(observed), 0.0)
    return np.asarray((found >= observed - TIE * finite).mean(axis=0))


def permutation(
    data: Array,
    sizes: Sizes,
    alternative: str = "two-sided",
    *,
    shift: float = 0.0,
    flips: int = FLIPS,
    rng: np.random.Generator | None = None,
) -> Array:
    """P-values of "the arm's runs are like the reference's", shape ``[sets]`` (a scalar array for one set).

    ``alternative`` is ``two-sided``, ``greater`` (the arm's mean is larger) or ``less``. The arm's runs are moved by ``shift`` before.
    """
    assert alternative in ("two-sided", "greater", "less"), alternative
    values = np.asarray(data, dtype=np.float64)
    columns = values.reshape(len(values), -1)
    patterns = group_patterns(sizes, flips, rng)
    step = max(CHUNK // len(patterns), 1)
    pieces = [columns[:, at : at + step] for at in range(0, columns.shape[1], step)]
    tails = [_tail(_statistics(_blocks_of(patterns, piece, sizes), shift), alternative) for piece in pieces]
    return np.concatenate(tails).reshape(values.shape[1:])


def group_equivalence(data: Array, sizes: Sizes, margin: float, *, flips: int = FLIPS, rng: np.random.Generator | None = None) -> Array:
    """P-values of two one-sided permutation tests (TOST, Schuirmann 1987) of "the means differ by ``margin`` or more"."""
    values = np.asarray(data, dtype=np.float64)
    if margin <= 0:
        return np.ones(values.shape[1:])
    above = permutation(values, sizes, "greater", shift=margin, flips=flips, rng=rng)
    return np.maximum(above, permutation(values, sizes, "less", shift=-margin, flips=flips, rng=rng))


def group_interval(data: Array, sizes: Sizes, alpha: float) -> tuple[float, float]:
    """The shifts between the groups that the two-sided test at ``alpha`` does not reject; infinite where it can reject none."""
    return _unrejected(data, sizes, alpha, ("two-sided", "two-sided"))


def group_equivalence_interval(data: Array, sizes: Sizes, alpha: float) -> tuple[float, float]:
    """The shifts that neither one-sided test at ``alpha`` rejects: TOST finds equivalence where it lies within the margin."""
    return _unrejected(data, sizes, alpha, ("greater", "less"))


def _unrejected(data: Array, sizes: Sizes, alpha: float, tests: tuple[str, str]) -> tuple[float, float]:
    values = np.asarray(data, dtype=np.float64)
    runs = _total(sizes)
    flips = max(flips_for(10 * alpha, runs), min(flips_for(alpha, runs), FLIPS_OF_ENDS))
    centre, reach = float(group_difference(values, sizes)), float(np.ptp(values))

    least = 1 / divisions(sizes) if "greater" in tests else smallest_p(sizes)
    if least > alpha:
        return -np.inf, np.inf
    if reach == 0:  # runs that are all equal: any other shift is rejected
        return centre, centre
    blocks = _blocks_of(group_patterns(sizes, flips), values[:, None], sizes)
    return invert_test(lambda shift, side: float(_tail(_statistics(blocks, -shift), tests[side > 0])[0]), centre, reach, alpha)


def superiority(blocks: list[tuple[Array, Array]]) -> float:
    """Chance that a run of the arm beats one of the reference, equal ones counting half, in the mean over the blocks."""
    chances = [float(np.mean((np.sign(np.subtract.outer(ours, theirs)) + 1) / 2)) for ours, theirs in blocks]
    return float(np.mean(chances))
