"""Early stopping spends α, never more."""

import numpy as np
import pytest

from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.sequential import crossing_look, look_pairs, sequential_holm, sequential_p, spent_alpha
from esper.compare.statistics.sign_flip import sign_flip
from esper.compare.statistics.verdicts import holm


def test_looks_are_even_and_never_before_a_decision_is_possible() -> None:
    assert look_pairs(15, 3, 6) == [6, 10, 15]
    assert look_pairs(30, 3, 6) == [10, 20, 30]
    assert look_pairs(4, 3, 6) == [4]


def test_spending_is_slow_at_first_and_complete_at_the_end() -> None:
    amounts = [spent_alpha(f, 0.05) for f in (0.33, 0.67, 1.0)]
    assert amounts == sorted(amounts)
    assert amounts[0] < 0.001
    assert amounts[-1] == pytest.approx(0.05)


def test_a_clear_difference_stops_before_the_end() -> None:
    data = generator("test").normal(3.0, 1.0, (15, 200))
    first = crossing_look(data, [5, 10, 15], 15, 0.05)
    assert (first == 1).mean() > 0.95


def test_a_look_taken_live_agrees_with_the_same_look_taken_later() -> None:
    data = generator("test").normal(0.9, 1.0, (20, 60))
    live, later = (crossing_look(data[:count], [8, 14, 20], 20, 0.05) for count in (14, 20))
    np.testing.assert_array_equal(live[live >= 0], later[live >= 0])


def test_three_looks_at_nothing_are_wrong_five_times_in_a_hundred_at_most() -> None:
    data = generator("test").standard_t(3, (12, 2, 3_000))
    wrong = sequential_holm(data, [6, 9, 12], 12, 0.05).any(axis=0).mean()
    assert 0.02 < wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 3_000)


def test_holm_gives_a_rejected_comparison_share_to_the_others() -> None:
    rng = generator("test")
    clear, faint = rng.normal(4.0, 1.0, (12, 1, 400)), rng.normal(0.75, 1.0, (12, 1, 400))
    alone = sequential_holm(np.concatenate([np.zeros_like(clear), faint], axis=1), [6, 12], 12, 0.05)[1].mean()
    beside = sequential_holm(np.concatenate([clear, faint], axis=1), [6, 12], 12, 0.05)[1].mean()
    assert beside > alone


@pytest.mark.parametrize("noise", ["normal", "far off", "tied", "zeros"])
@pytest.mark.parametrize("comparisons", [1, 3])
def test_of_all_sign_patterns_of_any_data_no_more_than_alpha_are_ever_called_different(noise: str, comparisons: int) -> None:
    """Counted, not simulated: if the arms are alike, every pattern is as likely as the one observed."""
    rng = generator(noise)
    data = {
        "normal": rng.normal(size=12),
        "far off": rng.standard_cauchy(12),
        "tied": rng.integers(-3, 4, 12).astype(float),
        "zeros": np.where(rng.random(12) < 0.5, 0.0, rng.normal(size=12)),
    }[noise]
    signs = 1.0 - 2.0 * ((np.arange(2**12)[None, :] >> np.arange(12)[:, None]) & 1)
    flipped = np.repeat((signs * data[:, None])[:, None, :], comparisons, axis=1)
    called = sequential_holm(flipped, [6, 9, 12], 12, 0.05).any(axis=0).mean()
    assert called <= 0.05
    if noise == "normal":
        assert called > 0.04 / comparisons


@pytest.mark.parametrize("count", [6, 9, 12])
def test_p_values_that_count_the_looks_agree_with_what_the_looks_decide(count: int) -> None:
    rng, looks = generator("test"), [6, 9, 12]
    data = rng.normal(rng.uniform(0, 2, (1, 3, 40)), 1.0, (12, 3, 40))[:count]
    p = np.stack([sequential_p(data[:, :, at], looks, 12) for at in range(40)], axis=1)
    for alpha in (0.01, 0.05, 0.2):
        near = np.abs(holm(p) - alpha) < 3 * 3 / 2**11  # a pattern a look, times Holm's factor
        np.testing.assert_array_equal((holm(p) <= alpha)[~near], sequential_holm(data, looks, 12, alpha)[~near])
    assert count < 12 or (p.min() < 0.02 and p.max() > 0.05)


def test_p_values_that_count_the_looks_are_those_of_one_look_where_there_is_one() -> None:
    data = generator("test").normal(0.7, 1.0, (12, 30))
    np.testing.assert_allclose(sequential_p(data, [12], 12), sign_flip(data), rtol=2e-3)


def test_p_values_that_count_the_looks_are_below_no_level_more_often_than_that() -> None:
    """Counted over all sign patterns, as above; to a pattern a look."""
    signs = 1.0 - 2.0 * ((np.arange(2**8)[None, :] >> np.arange(8)[:, None]) & 1)
    p = sequential_p(signs * generator("test").normal(size=8)[:, None], [6, 7, 8], 8)
    for level in (0.02, 0.05, 0.1, 0.3):
        assert np.mean(p <= level) <= level + 3 / 2**7
