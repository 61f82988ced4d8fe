"""The permutation test of two groups: against scipy's, its exactness, and the intervals that belong to it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from esper.compare.statistics.group_power import detectable_by_groups, fewest_runs, group_power, needed_runs, runs_needed
from esper.compare.statistics.permutation import (
    EXACT_DIVISIONS,
    divisions,
    group_difference,
    group_equivalence,
    group_equivalence_interval,
    group_interval,
    group_patterns,
    permutation,
    smallest_p,
    superiority,
)
from esper.compare.statistics.random_draws import generator

ALPHA = 0.05


def welch(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    spread = first.var(axis, ddof=1) / first.shape[axis] + second.var(axis, ddof=1) / second.shape[axis]
    return (first.mean(axis) - second.mean(axis)) / np.sqrt(spread)


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (3, 6), (7, 5)])
def test_it_is_scipys_permutation_test_with_welchs_statistic(ours: int, theirs: int) -> None:
    rng = generator("scipy", ours)
    first, second = rng.normal(0.8, 1, ours), rng.normal(0, 2, theirs)
    data, sizes = np.concatenate([first, second]), ((ours, theirs),)
    both = stats.permutation_test(
        (first, second), lambda a, b, axis=-1: np.abs(welch(a, b, axis)), alternative="greater", n_resamples=np.inf
    )
    assert permutation(data, sizes) == pytest.approx(both.pvalue)
    for side in ("greater", "less"):
        one = stats.permutation_test((first, second), welch, alternative=side, n_resamples=np.inf)
        assert permutation(data, sizes, side) == pytest.approx(one.pvalue)


def test_no_division_is_rejected_more_often_than_the_level_says() -> None:
    """Exactness by counting: each of the divisions of one data set stands for the data observed."""
    values, sizes = generator("exact").lognormal(size=9), ((4, 5),)
    patterns = group_patterns(sizes).astype(bool)
    sets = np.stack([np.concatenate([values[row], values[~row]]) for row in patterns], axis=1)
    p = permutation(sets, sizes)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p <= level) <= level
    assert p.min() == pytest.approx(1 / divisions(sizes))


def test_ties_count_as_equal_however_they_are_rounded() -> None:
    counts = np.array([300, 301, 301, 302, 299, 299, 300, 301]) / 360
    shaken = counts * (1 + np.array([1, -1, 1, -1, 1, -1, 1, -1]) * 1e-15)
    assert permutation(counts, ((4, 4),)) == permutation(shaken, ((4, 4),)) == permutation(np.round(counts * 360), ((4, 4),))
    assert permutation(np.full(8, 0.5), ((4, 4),)) == 1.0


def test_groups_of_one_size_are_ordered_by_their_difference_alone() -> None:
    rng = generator("equal sizes")
    data = rng.normal(size=10)
    plain = stats.permutation_test(
        (data[:5], data[5:]), lambda a, b, axis=-1: np.abs(a.mean(axis) - b.mean(axis)), n_resamples=np.inf, alternative="greater"
    )
    assert permutation(data, ((5, 5),)) == pytest.approx(plain.pvalue)


def test_blocks_exchange_their_runs_among_themselves() -> None:
    """Two blocks at different heights: pooled carelessly, the heights would hide the difference."""
    rng = generator("blocks")
    blocks = [np.concatenate([level + 0.5 + rng.normal(0, 0.1, 4), level + rng.normal(0, 0.1, 4)]) for level in (0.0, 100.0)]
    data, sizes = np.concatenate(blocks), ((4, 4), (4, 4))
    assert len(group_patterns(sizes)) == 70**2 == divisions(sizes)
    assert permutation(data, sizes) == pytest.approx(2 / 70**2)
    assert group_difference(data, sizes) == pytest.approx(np.mean([group_difference(one, ((4, 4),)) for one in blocks]))


def test_many_runs_draw_divisions_at_random_and_count_the_observed_one_in() -> None:
    sizes = ((20, 25),)
    assert divisions(sizes) > EXACT_DIVISIONS
    patterns = group_patterns(sizes, 999)
    assert patterns.shape == (1_000, 45) and (patterns.sum(axis=1) == 20).all() and patterns[0, :20].all()
    data = np.concatenate([np.full(20, 5.0), np.zeros(25)]) + generator("many").normal(0, 0.1, 45)
    assert permutation(data, sizes, flips=999) == pytest.approx(1 / 1_000)


@pytest.mark.parametrize("sizes", [((6, 6),), ((5, 9),), ((20, 20),), ((4, 4), (5, 3))])
def test_an_interval_leaves_out_zero_exactly_where_the_test_rejects(sizes: tuple[tuple[int, int], ...]) -> None:
    for number in range(8):
        data = generator("interval", number).normal(size=sum(map(sum, sizes)))
        data[: sizes[0][0]] += number * 0.3
        p = float(permutation(data, sizes))
        low, high = group_interval(data, sizes, ALPHA)
        assert (not low <= 0 <= high) == (p <= ALPHA)
        inner = group_equivalence_interval(data, sizes, ALPHA)
        for margin in (0.5, 1.5):
            assert (-margin < inner[0] and inner[1] < margin) == (group_equivalence(data, sizes, margin) <= ALPHA)


def test_too_few_runs_have_no_interval() -> None:
    assert group_interval(np.array([1.0, 1.1, 1.2, 0.1, 0.2, 0.3]), ((3, 3),), ALPHA) == (-np.inf, np.inf)
    assert smallest_p(((3, 3),)) == pytest.approx(0.1) and fewest_runs(ALPHA) == 4 and fewest_runs(ALPHA, 3) == 5


def test_the_chance_to_beat_a_run_counts_ties_half() -> None:
    assert superiority([(np.array([1.0, 2.0]), np.array([1.0, 0.0]))]) == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_power_is_that_of_the_t_test_and_the_needed_runs_have_it() -> None:
    from statsmodels.stats.power import TTestIndPower

    assert group_power(20, 0.9, ALPHA) == pytest.approx(TTestIndPower().power(0.9, 20, ALPHA), abs=1e-6)
    for effect in (0.8, 3.0):
        runs = needed_runs(effect, 0.8, ALPHA)
        assert group_power(runs, effect, ALPHA) >= 0.8 > group_power(runs - 1, effect, ALPHA)
        assert group_power(runs, detectable_by_groups(runs, 0.8, ALPHA), ALPHA) == pytest.approx(0.8, abs=0.01)
    assert group_power(3, 9.0, ALPHA) == 0.0 and detectable_by_groups(3, 0.8, ALPHA) == np.inf


def test_more_runs_are_asked_for_where_the_smallest_difference_worth_having_is_hidden() -> None:
    rng = generator("needs")
    first, second = rng.normal(0, 1, 6), rng.normal(0, 1, 6)
    found = runs_needed([(first, second)], float(first.mean() - second.mean()), 1.0, 0.8, ALPHA)
    assert found.rows[0].difference == 1.0 and found.rows[0].between[0] <= found.rows[0].more <= found.rows[0].between[1]
    assert 6 + found.rows[0].more == pytest.approx(needed_runs(1.0 / found.spread, 0.8, ALPHA), abs=0)
    assert runs_needed([(first[:3], second[:3])], 0.1, 1.0, 0.8, ALPHA).rows == ()
