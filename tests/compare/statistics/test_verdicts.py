"""Whole sweeps, and what the verdict may never do."""

import numpy as np
import pytest

from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.verdicts import Verdict, classify, holm, holm_levels, verdicts


def test_identical_arms_are_called_better_in_five_of_a_hundred_sweeps_at_most() -> None:
    runs = generator("test").lognormal(0.0, 1.0, (8, 4, 3_000))
    codes = verdicts(runs[:, 1:] - runs[:, :1], 0.01, 0.05)
    wrong = np.isin(codes, (Verdict.A_BETTER, Verdict.B_BETTER)).any(axis=0).mean()
    assert wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 3_000)


def test_arms_apart_by_the_margin_are_called_equivalent_in_five_of_a_hundred_at_most() -> None:
    runs = generator("test").normal(0.0, 1.0, (10, 3, 3_000))
    codes = verdicts(runs[:, 1:] - runs[:, :1] + 2.0, 2.0, 0.05)
    assert (codes == Verdict.EQUIVALENT).any(axis=0).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 3_000)


def test_a_sure_difference_too_small_to_matter_is_equivalent() -> None:
    sure_and_small = np.full((10, 1, 1), 0.001) + generator("test").normal(0, 1e-4, (10, 1, 1))
    assert verdicts(sure_and_small, 0.01, 0.05)[0, 0] == Verdict.EQUIVALENT
    assert verdicts(sure_and_small, 0.0001, 0.05)[0, 0] == Verdict.B_BETTER
    assert verdicts(-sure_and_small, 0.0001, 0.05)[0, 0] == Verdict.A_BETTER


def test_nothing_sure_is_inconclusive() -> None:
    assert classify(np.array([1.0]), np.array([0.2]), np.array([0.2]), 0.05)[0] == Verdict.INCONCLUSIVE


@pytest.mark.usefixtures("heavy_libraries")
def test_holm_equals_statsmodels_also_side_by_side() -> None:
    from statsmodels.stats.multitest import multipletests

    p = generator("test").uniform(0, 0.2, (5, 20))
    expected = np.stack([multipletests(column, method="holm")[1] for column in p.T], axis=1)
    np.testing.assert_allclose(holm(p), expected)


def test_a_comparison_is_rejected_by_holm_exactly_where_its_p_reaches_the_level_that_holm_leaves_it() -> None:
    def levels(*p: float) -> list[float]:
        return holm_levels(np.array(p), holm(np.array(p)), 0.05).tolist()

    assert levels(0.001, 0.03, 0.02) == [0.05 / 3, 0.05, 0.05 / 2]
    assert levels(*[1e-6] * 4) == [0.05 / 4, 0.05 / 3, 0.05 / 2, 0.05]
    assert levels(0.4, 0.001, 0.3, 0.5) == [0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3]
    for p in generator("levels").choice([0.0001, 0.004, 0.01, 0.02, 0.03, 0.05, 0.3], (200, 5)):
        np.testing.assert_array_equal(holm(p) <= 0.05, p <= levels(*p))
