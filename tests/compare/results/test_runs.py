"""How the runs of a sweep pair up by seed."""

import numpy as np
import pytest

from esper.compare.results.runs import Run, pair, pool
from esper.errors import UserError


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
