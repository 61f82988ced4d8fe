"""Single numbers about runs and pairs: the interquartile mean, the probability of improvement, gap recovery."""

import numpy as np
import pytest
from scipy.stats import trim_mean

from esper.compare.statistics.estimates import gap_recovery, iqm, probability_of_improvement
from esper.compare.statistics.random_draws import generator


def test_interquartile_mean_ignores_the_outer_quarters() -> None:
    assert iqm(np.array([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0])) == pytest.approx(3.5)
    for count in range(1, 20):
        values = generator("iqm", count).standard_normal(count)
        assert iqm(values) == pytest.approx(trim_mean(values, 0.25), rel=1e-12)


def test_probability_of_improvement_is_that_of_pairs_and_counts_ties_half() -> None:
    levels = np.array([0.1, 0.5, 0.9, 0.3])  # far apart between the seeds, and the arm is better within each but one
    better = levels + np.array([0.01, 0.01, 0.01, 0.0])
    assert probability_of_improvement(better - levels, np.full(4, 1e-12)) == 7 / 8
    assert probability_of_improvement(levels - better, np.full(4, 1e-12)) == 1 / 8
    assert probability_of_improvement(np.array([0.3 - 0.2 - 0.1]), np.array([1e-15])) == 1 / 2


def test_gap_recovery_is_given_only_where_there_is_a_gap() -> None:
    rng = generator("gap")
    small = rng.normal(0.6, 0.02, 12)
    final, grown = small + 0.1 + rng.normal(0, 0.01, 12), small + 0.08 + rng.normal(0, 0.01, 12)
    found = gap_recovery(small, final, grown)
    assert found.known
    assert found.value_interval[0] < found.value == pytest.approx(0.8, abs=0.1)
    assert found.value < found.value_interval[1]
    none = gap_recovery(small, small + rng.normal(0, 0.01, 12), grown)
    assert not none.known
    assert none.gap_interval[0] < 0 < none.gap_interval[1]
