"""Interquartile means and performance profiles, as Agarwal et al. (2021) define them."""

import numpy as np
import pytest
from scipy import stats

from esper.compare.statistics.profiles import bounds, interquartile_means, profile, resampled, thresholds
from esper.compare.statistics.random_draws import generator


def test_the_interquartile_mean_is_scipys_trimmed_mean_of_every_row() -> None:
    rows = generator("iqm").normal(size=(5, 14))
    assert interquartile_means(rows) == pytest.approx(stats.trim_mean(rows, 0.25, axis=1))


def test_the_bootstrap_draws_within_each_block() -> None:
    blocks = [np.zeros(4), np.full(6, 10.0)]
    rows = resampled(blocks, 200)
    assert rows.shape == (200, 10) and (rows[:, :4] == 0).all() and (rows[:, 4:] == 10).all()
    low, high = bounds(rows.mean(axis=1))
    assert low == high == 6.0


def test_a_profile_is_the_share_of_runs_above_each_threshold() -> None:
    values = np.array([0.1, 0.2, 0.2, 0.9])
    assert profile(values[None], np.array([0.0, 0.1, 0.2, 0.95])) == pytest.approx(np.array([[1.0, 0.75, 0.25, 0.0]]))
    at = thresholds(values)
    assert (at[0], at[-1]) == (0.1, 0.9)
