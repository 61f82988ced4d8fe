"""The sign-flip test against brute force, scipy and its own promises."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sequential import crossing_look, sequential_p
from esper.compare.statistics.sign_flip import (
    EXACT_PAIRS,
    FLIPS,
    equivalence,
    finest_level,
    flips_for,
    interval,
    rounding,
    sign_flip,
    sign_patterns,
)


def brute(data: np.ndarray) -> float:
    sums = [abs(np.dot(signs, data)) for signs in product((-1, 1), repeat=len(data))]
    return float(np.mean(np.array(sums) >= abs(data.sum()) - 1e-9))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_two_sided_p_is_the_share_of_sign_patterns_at_least_as_far(values: list[int]) -> None:
    assert sign_flip(np.array(values, float)) == pytest.approx(brute(np.array(values, float)))


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_exact_p_equals_scipy(alternative: str) -> None:
    data = generator("test").normal(0.3, 1.0, 11)
    expected = stats.permutation_test((data,), np.sum, permutation_type="samples", alternative=alternative, n_resamples=np.inf)
    assert sign_flip(data, alternative) == pytest.approx(expected.pvalue, abs=1e-9)


def test_monte_carlo_agrees_with_the_t_test_and_never_gives_zero() -> None:
    data = generator("test").normal(0.4, 1.0, 40)
    assert sign_flip(data) == pytest.approx(stats.ttest_1samp(data, 0).pvalue, abs=0.01)
    assert sign_flip(np.ones(40)) == pytest.approx(1 / 10_000)


def test_small_levels_take_a_hundred_patterns_for_every_level_within_bounds() -> None:
    assert [flips_for(level, 20) for level in (0.05, 0.01, 1e-3, 1e-9)] == [FLIPS, FLIPS, 99_999, 999_999]
    assert flips_for(1e-9, 1_000) == 64_000
    assert (finest_level(15), finest_level(20)) == (0.0, 1e-5)
    more = sign_patterns(20, 99_999)
    np.testing.assert_array_equal(more[: FLIPS + 1], sign_patterns(20))  # the same ones first, however many are drawn
    assert more.nbytes == 100_000 * 20
    clear = np.full(20, 1.0) + generator("test").normal(0, 0.1, 20)
    assert sign_flip(clear, flips=99_999) == pytest.approx(1e-5, abs=2e-5)


def test_six_pairs_are_the_fewest_that_reach_five_percent() -> None:
    assert sign_flip(np.ones(5)) > 0.05 >= sign_flip(np.ones(6))


def test_data_sets_side_by_side_give_what_they_give_alone() -> None:
    data = generator("test").normal(size=(EXACT_PAIRS, 7))
    np.testing.assert_allclose(sign_flip(data), [sign_flip(column) for column in data.T])


def test_no_difference_and_no_pairs_give_one() -> None:
    assert sign_flip(np.zeros(8)) == 1.0
    assert sign_flip(np.zeros(0)) == 1.0


def test_equivalence_needs_the_mean_inside_the_margin() -> None:
    data = generator("test").normal(0.0, 0.1, 12)
    assert equivalence(data, 0.5) < 0.001
    assert equivalence(data + 0.5, 0.5) > 0.05
    assert equivalence(data, 0.0) == 1.0


def test_interval_ends_where_the_test_starts_to_reject() -> None:
    data = generator("test").normal(1.0, 1.0, 10)
    low, high = interval(data, 0.05)
    assert low < data.mean() < high
    for inside, outside in ((low + 1e-6, low - 1e-6), (high - 1e-6, high + 1e-6)):
        assert sign_flip(data - inside) > 0.05 >= sign_flip(data - outside)


def test_interval_of_five_pairs_has_no_end() -> None:
    assert interval(np.array([1.0, 2.0, 3.0, 2.0, 1.0]), 0.05) == (-np.inf, np.inf)


def test_interval_of_equal_differences_is_a_point() -> None:
    assert interval(np.zeros(6), 0.05) == (0.0, 0.0)
    assert interval(np.full(8, 0.25), 0.05) == (0.25, 0.25)
    assert interval(np.zeros(5), 0.05) == (-np.inf, np.inf)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9), st.sampled_from([0.01, 0.05, 0.2]))
def test_of_all_sign_patterns_of_any_data_no_more_than_alpha_have_a_p_that_small(values: list[int], alpha: float) -> None:
    signs = np.array(list(product((-1, 1), repeat=len(values)))).T
    assert np.mean(sign_flip(signs * np.array(values, float)[:, None]) <= alpha) <= alpha


def counted(values: list[Fraction]) -> Fraction:
    """The share of all sign patterns that are at least as far, in exact arithmetic."""
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((-1, 1), repeat=len(values))]
    return Fraction(sum(one >= abs(sum(values)) for one in sums), len(sums))


@pytest.mark.parametrize(
    "values",
    [
        ["1e7", *["1e-3"] * 7],
        ["1e7", *(f"{value}e-3" for value in (1, 1.5, 0.7, 2.2, 0.9, 1.1, 3))],
        ["1e7", "1e7", *["1e-3"] * 6],
        ["-1e7", "1e-3", "2e-3", "3e-3", "-1e-3", "4e-3", "5e-3"],
        ["1e7", "-1e7", "1e-3", "2e-3", "3e-3", "4e-3", "5e-3", "6e-3"],
        ["1e12", "1e4", "1e-4", "1e-4", "2e-4", "-3e-4", "5e-4"],
        ["0.1", "0.2", "0.3", "-0.3", "0.7", "0.6", "-0.1"],
        ["1e-300", "2e-300", "3e-300", "-1e-300", "0", "5e-300", "7e-300"],
    ],
)
def test_p_is_exact_however_far_apart_the_differences_are_and_equal_sums_are_equal(values: list[str]) -> None:
    exact = counted([Fraction(value) for value in values])
    assert sign_flip(np.array(values, float)) == float(exact)
    assert sign_flip(np.array([values, values[::-1]], float).T) == pytest.approx([float(exact)] * 2, abs=0.0)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-3, 7)), min_size=1, max_size=8))
def test_p_equals_exact_arithmetic_for_decimals_of_any_size(parts: list[tuple[int, int]]) -> None:
    exact = counted([Fraction(digit) * Fraction(10) ** power for digit, power in parts])
    assert sign_flip(np.array([float(f"{digit}e{power}") for digit, power in parts])) == float(exact)


@pytest.mark.parametrize("samples", [7, 360, 10_000, 60_000])
def test_differences_of_accuracies_tie_as_their_counts_do(samples: int) -> None:
    rng = generator("accuracies", samples)
    ours, theirs = (samples - rng.integers(0, 5, 9) for _ in range(2))
    found = sign_flip((ours / samples) - (theirs / samples), error=rounding(ours / samples, theirs / samples))
    assert found == sign_flip((ours - theirs).astype(float)) == float(counted([Fraction(int(one)) for one in ours - theirs]))


def test_a_difference_that_rounding_alone_keeps_from_the_margin_is_a_tie_in_either_one_sided_test() -> None:
    ours, theirs = np.array([29, 52, 76, 90, 93, 95]) / 100, np.array([28, 51, 75, 89, 92, 94]) / 100
    assert len(set(ours - theirs)) > 1  # not one of them is 0.01 to the last bit
    assert equivalence(ours - theirs, 0.01, error=rounding(ours, theirs)) == 1.0


def test_the_interval_beside_a_large_value_still_ends_where_the_test_rejects() -> None:
    assert interval(np.array([1e7, *[1e-3] * 7]), 0.05)[0] == pytest.approx(1e-3, abs=2e-5)


def test_a_look_is_no_blinder_for_one_large_value() -> None:
    small = np.array([1.0, 1.5, 0.7, 2.2, 0.9, 1.1, 3.0, 0.4, 1.3, 2.5]) * 1e-3
    assert crossing_look(np.array([1e7, *small]), [11], 11, 0.05)[0] == 0
    assert sequential_p(np.array([1e7, *small]), [11], 11)[0] < 0.01


def test_sums_that_differ_by_the_rounding_of_adding_alone_are_ties() -> None:
    """0.1 + 0.2 − 0.3 is not 0 in binary, though each number is as exact as it can be: 5 of 8 patterns of the three, in either sign."""
    differences = np.array([0.1, 0.2, -0.3, 1.0, 1.0, 1.0])
    assert sign_flip(differences, error=np.zeros(6)) == pytest.approx(2 * 5 / 64)
