"""Optuna tunes the arms of a comparison: fair between them, in the order of the queue, and the same after a kill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from test_run_sweep import ARMS, go, likes, sweep_of

from esper.cli.compose import compose
from esper.compare.sweep.job_queue import JobQueue
from esper.compare.sweep.run_sweep import judge_sweep
from esper.compare.sweep.sweep import TuningJob
from esper.compare.sweep.tuning_trials import tuning_space
from esper.config import RootConfig
from esper.errors import UserError
from esper.search.space import Dimension

TUNE = {"tune": {"optimizer.lr": "tag(log,interval(1e-3,1))", "trainer.clip": [1.0, 2.0]}, "tune_trials": 8, "tune_seeds": 2}


def nearest(config: RootConfig, folder: Path) -> tuple[float, str]:
    """An outcome: each arm has a rate of its own that suits it best."""
    best = 0.3 if config.grafting.name == "drift" else 0.01
    return -abs(math.log(config.optimizer.lr / best)), "FINISHED"


@pytest.mark.slow
def test_every_arm_has_as_many_trials_and_the_same_seeds_and_learns_from_its_own(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ARMS, 1, **TUNE)
    ran = go(sweep, nearest).ran
    tried = {arm: [c for c in ran if c.grafting.name == arm and c.seed >= 1_000_000] for arm in ("linear", "drift")}
    settings = {arm: [(c.optimizer.lr, c.trainer.clip) for c in found] for arm, found in tried.items()}
    assert [len(found) for found in tried.values()] == [16, 16] and all(len(set(found)) == 8 for found in settings.values())
    assert settings["linear"][:6] == settings["drift"][:6] and settings["linear"] != settings["drift"], "they learn from their own"
    assert all({c.seed for c in found} == {1_000_000, 1_000_001} for found in tried.values())
    for name, arm in (("linear", "a"), ("drift", "b")):
        best = max(tried[name], key=lambda c: nearest(c, tmp_path)[0])
        (compared,) = (c for c in ran if c.grafting.name == name and c.seed < 1_000_000)
        assert compared.optimizer.lr == best.optimizer.lr == sweep.tuned[(arm, "")].values["optimizer.lr"]
        assert sweep.tuned[(arm, "")].runs == 16 and len(sweep.tuned[(arm, "")].tried) == 8
    assert go(sweep_of(tmp_path, ARMS, 1, **TUNE), nearest).ran == [], "the same trials again, whose runs are done"
    comparison = judge_sweep(sweep)
    assert comparison is not None and comparison.tuned == list(sweep.tuned.values())


@pytest.mark.slow
def test_a_sweep_that_was_killed_within_its_trials_ends_with_the_same_ones(tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for a kill."""

    whole, left = go(sweep_of(tmp_path / "whole", ARMS, 1, **TUNE), nearest).ran, 19

    def until(config: RootConfig, folder: Path) -> tuple[float, str]:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return nearest(config, folder)

    with pytest.raises(Killed):
        go(sweep_of(tmp_path / "killed", ARMS, 1, **TUNE), until)
    rest = go(sweep_of(tmp_path / "killed", ARMS, 1, **TUNE), nearest).ran
    assert [(c.seed, c.optimizer.lr) for c in rest] == [(c.seed, c.optimizer.lr) for c in whole[19:]]


def test_trials_drawn_by_chance_run_side_by_side_and_one_that_learns_waits_for_all_before_it(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ARMS, 1, **{**TUNE, "tune_trials": 6, "tune_seeds": 1})
    queue, order = JobQueue(sweep, 99), []

    def begun() -> list[tuple[str, int]]:
        found = []
        while (entry := queue.next()) is not None:
            order.append(entry)
            job = queue.job(entry).job
            found.append((job.arm, job.trial if isinstance(job, TuningJob) else -1))
        return found

    queue.add({0})
    assert begun() == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert queue.ended(order[1]) is None and queue.trial_is_over(order[1]) and begun() == []
    assert queue.ended(order[0]) is None and begun() == [("a", 2)]
    for number in (2, 3, 4):
        queue.ended(order[number])
    assert begun() == [("a", 3), ("b", 2)]


def test_an_interval_is_typed_as_in_a_search() -> None:
    words = ['compare.tune={optimizer.lr:"tag(log,interval(1e-4,1e-1))"}', "compare.tune_trials=20"]
    compare = compose(words).compare
    assert tuning_space(compare.tune).dimensions == (Dimension("optimizer.lr", (), 1e-4, 1e-1, None, True, False),)


@pytest.mark.slow
def test_an_arm_of_equal_macs_tunes_no_length_and_keys_with_a_comma_share_a_value(tmp_path: Path) -> None:
    tune = {"trainer.steps": "range(20,60,20)", "optimizer.lr,optimizer.branch_lr": "interval(0.01,0.1)"}
    sweep = sweep_of(tmp_path, ARMS, 1, tune=tune, tune_trials=3, tune_seeds=1, equal_macs={"b": "a/a"})
    ran = [c for c in go(sweep, nearest).ran if c.seed >= 1_000_000]
    assert len(ran) == 6 and all(c.optimizer.lr == c.optimizer.branch_lr for c in ran)
    assert set(sweep.tuned[("a", "")].values) == {"trainer.steps", "optimizer.lr", "optimizer.branch_lr"}
    assert set(sweep.tuned[("b", "")].values) == {"optimizer.lr", "optimizer.branch_lr"}


@pytest.mark.parametrize(
    ("tune", "trials", "sentence"),
    [
        ({"optimizer.lr": "interval(0.1,1)"}, 0, "which no grid has: add compare.tune_trials"),
        ({"optimizer.lr": "fast"}, 3, "compare.tune.optimizer.lr=fast is not accepted"),
        ({"optimizer.lr": "interval(-1,1)"}, 3, "optimizer.lr=-1.0 is not accepted"),
        ({"optimizer.lr": []}, 3, "give a list"),
    ],
)
def test_a_space_that_cannot_be_tuned_in_gets_a_sentence(tune: dict[str, Any], trials: int, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        go(sweep_of(tmp_path, ARMS, 1, tune=tune, tune_trials=trials), likes)
