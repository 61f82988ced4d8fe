"""Optuna behind ask and tell: what it proposes depends on the seed and the trials so far alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.errors import UserError
from esper.search.config import SearchConfig
from esper.search.space import Dimension, Space
from esper.search.study import Study, pareto

SPACE = Space((Dimension("lr", (), 1e-4, 1e-1, log=True), Dimension("width", (), 16, 64, 16, whole=True), Dimension("kind", ("a", "b"))))


def tried(study: Study, until: int) -> list[dict[str, str]]:
    """Settings of the trials, each worth more the nearer its rate is to 0.01."""
    for one in study.unfinished():
        study.finish(one.number, worth(one.values)[: len(study.directions)])
    while len(study.trials) < until:
        one = study.ask()
        study.finish(one.number, worth(one.values)[: len(study.directions)])
    return [study.space.texts(one.params) for one in study.trials]


def worth(values: dict[str, str]) -> list[float]:
    return [-abs(float(values["lr"]) - 0.01), float(values["width"])]


@pytest.mark.parametrize(
    ("sampler", "directions"), [("tpe", ["max"]), ("random", ["max"]), ("nsga2", ["max", "min"]), ("tpe", ["max", "min"])]
)
def test_a_study_that_is_broken_off_and_opened_again_proposes_what_an_undisturbed_one_does(
    sampler: str, directions: list[str], tmp_path: Path
) -> None:
    settings = SearchConfig(sampler=sampler, startup=4)
    whole = tried(Study(SPACE, settings, directions), 12)
    first = Study(SPACE, settings, directions, tmp_path / "study")
    tried(first, 5)
    first.ask()  # under way when the process dies
    again = Study(SPACE, settings, directions, tmp_path / "study")
    assert [one.number for one in again.unfinished()] == [5]
    assert tried(again, 12) == whole
    assert tried(Study(SPACE, SearchConfig(sampler=sampler, startup=4, seed=1), directions), 12) != whole


def test_after_a_start_by_chance_it_proposes_what_has_paid() -> None:
    found = tried(Study(SPACE, SearchConfig(startup=10), ["max"]), 60)
    near = [sum(abs(float(one["lr"]) - 0.01) < 0.005 for one in part) for part in (found[:20], found[-20:])]
    assert near[1] >= 2 * near[0] > 0


def test_a_trial_that_falls_behind_the_median_is_to_end_and_a_number_that_is_none_decides_nothing() -> None:
    study = Study(SPACE, SearchConfig(prune_trials=3), ["max"])
    for value in (0.5, 0.6, 0.7):
        number = study.ask().number
        assert not study.report(number, 10, value)
        study.finish(number, [value])
    low, high, broken = (study.ask().number for _ in range(3))
    assert study.report(low, 10, 0.55) and not study.report(high, 10, 0.65) and not study.report(broken, 10, float("nan"))
    study.prune(low)
    study.fail(broken)
    assert [one.state.name for one in study.trials[3:]] == ["PRUNED", "RUNNING", "FAIL"]


def test_several_objectives_make_a_front_and_prune_nothing() -> None:
    study = Study(SPACE, SearchConfig(), ["max", "min"])
    for quality, cost in ((0.5, 1.0), (0.6, 2.0), (0.4, 3.0)):
        number = study.ask().number
        assert not study.report(number, 10, -1.0)
        study.finish(number, [quality, cost])
    assert study.front() == [0, 1]
    assert pareto([(0.5, 1.0), (0.6, 2.0), (0.4, 3.0), (0.6, 4.0)]) == [0, 1]


def test_a_study_of_another_space_is_not_gone_on_with(tmp_path: Path) -> None:
    Study(SPACE, SearchConfig(), ["max"], tmp_path / "study")
    with pytest.raises(UserError, match="another search space"):
        Study(Space(SPACE.dimensions[:1]), SearchConfig(), ["max"], tmp_path / "study")
    with pytest.raises(UserError, match="another search space or other objectives"):
        Study(SPACE, SearchConfig(), ["min"], tmp_path / "study")
    Study(SPACE, SearchConfig(n_trials=100), ["max"], tmp_path / "study")
