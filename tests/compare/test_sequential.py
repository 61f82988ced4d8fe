"""Early stopping spends α, never more."""

import numpy as np
import pytest

from esper.compare.draws import generator
from esper.compare.sequential import crossing_look, look_pairs, sequential_holm, spent


def test_looks_are_even_and_never_before_a_decision_is_possible() -> None:
    assert look_pairs(15, 3, 6) == [6, 10, 15]
    assert look_pairs(30, 3, 6) == [10, 20, 30]
    assert look_pairs(4, 3, 6) == [4]


def test_spending_is_slow_at_first_and_complete_at_the_end() -> None:
    amounts = [spent(f, 0.05) for f in (0.33, 0.67, 1.0)]
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
