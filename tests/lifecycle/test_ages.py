"""Durations become ticks; a schedule that cannot end is refused, and the sentence names the stage."""

from __future__ import annotations

import pytest

from esper.errors import UserError
from esper.grafting import CONFIGS, longest_ramp
from esper.lifecycle import LifecycleConfig, Stage, resolve
from esper.lifecycle.duration import LONGEST, parse
from esper.lifecycle.machine import Machine
from esper.lifecycle.table import SeedTable

MINIMA = {
    "TRAINING": "training_min",
    "STABILIZATION": "stabilization_min",
    "EVALUATING": "evaluating_min",
    "FINE_TUNING": "fine_tuning_min",
}


@pytest.mark.parametrize(
    ("text", "ticks"),
    [("50step", 50), ("1 step", 1), ("2epoch", 40), ("2.5 epochs", 50), ("5%", 50), ("0.01%", 1), ("0%", 0), ("0step", 0)],
)
def test_a_duration_is_steps_epochs_or_a_share_of_the_run(text: str, ticks: int):
    assert parse(text).ticks(total_ticks=1000, ticks_per_epoch=20) == ticks


def test_durations_that_no_run_reaches_are_as_good_as_never():
    text = "9" * 400 + "step"
    assert parse(text).ticks(total_ticks=1000, ticks_per_epoch=20) == LONGEST
    ages = resolve(LifecycleConfig(training_max=text, fade=text, embargo=text, judge_every=text), "1%", "1%", 1000, 100)
    machine = Machine(SeedTable(1), ages)
    for stage in (Stage.GERMINATED, Stage.TRAINING):
        machine.apply(0, stage, "test")
    machine.advance()
    assert machine.outlived() == [] and ages.maximum[Stage.CULLED] == 2 * LONGEST


@pytest.mark.parametrize("text", ["", "5", "-1step", "step", "5 days", "nan%", "1e3step", "%"])
def test_anything_else_is_refused_with_an_example(text: str):
    with pytest.raises(UserError, match="50step, 2epoch or 5%"):
        parse(text)


def test_steps_are_turned_into_epochs_where_a_tick_is_an_epoch():
    config = LifecycleConfig(
        clock="epoch", training_max="250step", training_min="100step", fine_tuning_max="9epoch", fine_tuning_min="300step"
    )
    ages = resolve(config, "4epoch", "1%", 100, 1, steps_per_tick=100)
    assert (ages.minimum[Stage.TRAINING], ages.maximum[Stage.TRAINING]) == (1, 3)
    assert (ages.minimum[Stage.FINE_TUNING], ages.maximum[Stage.FINE_TUNING], ages.ramp) == (3, 9, 4)


@pytest.mark.parametrize(("stage", "key"), MINIMA.items())
def test_a_stage_that_ends_before_it_may_be_left_is_refused_by_name(stage: str, key: str):
    with pytest.raises(UserError, match=rf"^{stage} can never be left.*lifecycle\.{stage.lower()}_max"):
        resolve(LifecycleConfig(**{key: "99%"}), "1%", "1%", 1000, 100)


def test_a_ramp_longer_than_grafting_is_refused_by_name():
    with pytest.raises(UserError, match=r"^GRAFTING can never be left.*grafting\.ramp"):
        resolve(LifecycleConfig(), "30%", "1%", 1000, 100)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_ramp_that_holding_makes_too_long_is_refused_and_the_longest_that_fits_is_not(name: str):
    strategy = CONFIGS[name](ramp="20step")
    longest = longest_ramp(strategy, 20)

    def resolved(most: int) -> None:
        config = LifecycleConfig(grafting_max=f"{most}step")
        resolve(config, "20step", "1%", 1000, 100, longest_ramp=lambda ramp: longest_ramp(strategy, ramp))

    resolved(longest)
    with pytest.raises(UserError, match=r"GRAFTING .*lifecycle.grafting_max"):
        resolved(longest - 1)


@pytest.mark.parametrize("stage", ["germinated", "training", "grafting", "stabilization", "evaluating", "fine_tuning"])
def test_a_stage_of_no_length_is_refused(stage: str):
    settings = {f"{stage}_max": "0step"} | ({MINIMA[stage.upper()]: "0step"} if stage.upper() in MINIMA else {})
    with pytest.raises(UserError, match=f"^{stage.upper()} can never be left"):
        resolve(LifecycleConfig(**settings), "0%" if stage == "grafting" else "1%", "1%", 1000, 100)


def test_a_run_too_short_for_the_way_to_the_end_is_refused_naming_where_it_would_stop():
    ages = "60step"
    config = LifecycleConfig(training_min=ages, training_max=ages, fine_tuning_min=ages, fine_tuning_max=ages)
    with pytest.raises(UserError, match=r"FINE_TUNING can never be left.*trainer.steps"):
        resolve(config, "5%", "1%", 100, 10)


def test_the_default_and_the_reference_schedule_fit_their_runs():
    ages = resolve(LifecycleConfig(), "5%", "1%", 4000, 15)
    path = ages.path()
    assert [stage for stage, _, _ in path] == [
        Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED,
    ]  # fmt: skip
    assert all(earliest <= latest for _, earliest, latest in path)
    assert path[-1][1] <= 4000
