"""Whole sweeps, and what the verdict may never do."""

import numpy as np
import pytest

from esper.compare.results.runs import Run, pair, pool
from esper.compare.statistics.random_draws import generator
from esper.compare.statistics.verdicts import Verdict, classify, verdicts
from esper.errors import UserError


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


def runs_of(arm: str, values: list[float], block: str = "", status: str = "FINISHED") -> list[Run]:
    return [Run(arm, seed, value, block, status) for seed, value in enumerate(values)]


def test_a_failed_run_counts_as_lost_by_the_largest_difference() -> None:
    runs = runs_of("a", [1.0, 1.0, 1.0]) + runs_of("b", [1.5, 0.8, float("nan")])
    found = pair(runs, "b", "a", "", 1.0, 0.1)
    np.testing.assert_allclose(found.tested, [0.5, -0.2, -0.5])
    assert found.finished.tolist() == [True, True, False]


def test_swapping_the_arms_turns_every_sign_also_of_failed_pairs() -> None:
    runs = runs_of("a", [1.0, float("inf"), 1.0, float("nan")]) + runs_of("b", [1.5, 0.8, float("nan"), float("nan")])
    there, back = pair(runs, "b", "a", "", 1.0, 0.1), pair(runs, "a", "b", "", 1.0, 0.1)
    np.testing.assert_allclose(there.tested, -back.tested)
    assert there.tested[3] == 0.0


def test_smaller_is_better_turns_the_difference() -> None:
    runs = runs_of("a", [1.0]) + runs_of("b", [0.7])
    assert pair(runs, "b", "a", "", -1.0, 0.0).tested[0] == pytest.approx(0.3)


def test_pooling_takes_one_number_a_seed() -> None:
    runs = runs_of("a", [0.0, 0.0], "x") + runs_of("b", [1.0, 2.0], "x")
    runs += runs_of("a", [0.0, 0.0, 0.0], "y") + runs_of("b", [3.0, 4.0, 9.0], "y")
    pooled = pool([pair(runs, "b", "a", block, 1.0, 0.0) for block in ("x", "y")])
    assert pooled is not None
    assert pooled.seeds == (0, 1)
    np.testing.assert_allclose(pooled.tested, [2.0, 3.0])


def test_arms_without_a_common_seed_are_refused() -> None:
    with pytest.raises(UserError, match="share no seed"):
        pair([Run("a", 0, 1.0), Run("b", 1, 1.0)], "b", "a", "", 1.0, 0.0)


def test_two_runs_of_one_arm_and_seed_are_refused() -> None:
    with pytest.raises(UserError, match="two runs with seed 0"):
        pair([Run("a", 0, 1.0), Run("a", 0, 1.0), Run("b", 0, 1.0)], "b", "a", "", 1.0, 0.0)
