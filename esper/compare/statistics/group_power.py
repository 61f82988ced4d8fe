"""The runs of each arm that a difference needs where runs are not paired, and the difference that a number of them finds.

Effects are in standard deviations of the runs inside an arm. As in :mod:`esper.compare.statistics.power`, the level of one comparison
among ``k`` is α/k. Both arms have the same number of runs, and of several blocks each has that many.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.permutation import EXACT_DIVISIONS, divisions, permutation, smallest_p
from esper.compare.statistics.power import MOST_PAIRS, MorePairs, PairsNeeded, least_count, least_effect, need_rows, spread_interval
from esper.compare.statistics.random_draws import generator

Array = NDArray[np.float64]
SIMULATED_RUNS = 6  # up to here few possible p-values make the test weaker than the t-test
DRAWS = 4_000


def fewest_runs(alpha: float, comparisons: int = 1, blocks: int = 1) -> int:
    """The smallest number of runs of each arm whose smallest two-sided p-value reaches α after Holm (4 at 0.05 in one block)."""
    runs = 2
    while smallest_p(((runs, runs),) * blocks) > alpha / max(comparisons, 1):
        runs += 1
    return runs


@lru_cache(maxsize=512)
def group_power(runs: int, effect: float, alpha: float, comparisons: int = 1, blocks: int = 1) -> float:
    """Chance of finding a difference of ``effect`` standard deviations between two arms of ``runs`` runs, two-sided, for normal noise.

    Simulated with the test itself up to 6 runs of each arm in one block, from the noncentral t distribution elsewhere.
    """
    level = alpha / max(comparisons, 1)
    if runs < fewest_runs(alpha, comparisons, blocks):
        return 0.0
    sizes = ((runs, runs),) * blocks
    if runs <= SIMULATED_RUNS and divisions(sizes) <= EXACT_DIVISIONS:
        data = generator("group power", runs).standard_normal((2 * runs * blocks, DRAWS))
        moved = np.tile(np.repeat([effect, 0.0], runs), blocks)[:, None]
        return float(np.mean(permutation(data + moved, sizes) <= level * (1 + 1e-12)))
    from scipy import special

    freedom, shift = 2 * blocks * (runs - 1), effect * np.sqrt(runs * blocks / 2)
    bound = -special.stdtrit(freedom, level / 2)
    below, wrong_side = np.nan_to_num(special.nctdtr(freedom, shift, np.array([bound, -bound])))
    return float(1 - below + wrong_side)


def needed_runs(effect: float, wanted: float, alpha: float, comparisons: int = 1, blocks: int = 1) -> int:
    """The smallest number of runs of each arm with at least the wanted power."""
    fewest = fewest_runs(alpha, comparisons, blocks)
    return least_count(lambda runs: group_power(runs, abs(effect), alpha, comparisons, blocks) >= wanted, fewest)


def detectable_by_groups(runs: int, wanted: float, alpha: float, comparisons: int = 1, blocks: int = 1) -> float:
    """The effect in standard deviations that so many runs of each arm find with the wanted power; inf below the fewest."""
    if runs < fewest_runs(alpha, comparisons, blocks):
        return float("inf")
    return least_effect(lambda effect: group_power(runs, effect, alpha, comparisons, blocks) >= wanted)


def runs_needed(
    groups: list[tuple[Array, Array]], difference: float, minimum_effect: float, wanted: float, alpha: float, comparisons: int = 1
) -> PairsNeeded:
    """How many more runs of each arm an undecided comparison needs; see :func:`esper.compare.statistics.power.pairs_needed`.

    Args:
        groups: for every block the values of the arm and of the reference.
        difference: the one seen, in the metric.
    """
    blocks, have = len(groups), min(min(map(len, one)) for one in groups)
    fewest = fewest_runs(alpha, comparisons, blocks)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for one in groups for side in one)
    freedom = sum(len(side) - 1 for one in groups for side in one)
    spread = float(np.sqrt(squares / freedom)) if freedom else float("nan")
    scale = max(float(np.abs(side).max()) for one in groups for side in one)
    slack = 1e-12 * scale
    if have < fewest or not spread > slack:
        return PairsNeeded(fewest, spread, (float("nan"), float("nan")), ())
    ends = spread_interval(spread, freedom + 1, alpha)

    def more(difference: float, spread: float) -> int:
        needed = needed_runs(difference / spread, wanted, alpha, comparisons, blocks)
        return MOST_PAIRS if needed >= MOST_PAIRS else max(needed - have, 0)

    def row(difference: float) -> MorePairs:
        found, least, most = (more(difference, size) for size in (spread, *ends))
        return MorePairs(difference, found, (min(least, found), max(most, found)))

    return PairsNeeded(fewest, spread, ends, need_rows(row, abs(difference), minimum_effect, slack))
