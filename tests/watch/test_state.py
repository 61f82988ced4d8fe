"""What a page knows of a run."""

from __future__ import annotations

import json
import math

from esper.lifecycle.stages import Stage
from esper.messages import Metrics, RunEnded
from esper.watch.state import POINTS, RunState
from tests.watch.conftest import moved, story, telemetry


def test_the_state_is_that_of_the_messages() -> None:
    state = RunState("mine")
    state.take(story())
    shown = state.snapshot()
    assert (shown["status"], shown["tick"], shown["total"], shown["loss"], shown["value"]) == ("RUNNING", 10, 20, 0.1, 0.75)
    assert shown["stages"] == {"dormant": 1, "grafting": 1} and shown["metric"] == "validation accuracy"
    (seed,) = shown["seeds"]
    assert (seed["site"], seed["seed"], seed["stage"], seed["blueprint"], seed["alpha"]) == ("fc1", 1, "GRAFTING", "mlp", 0.5)
    (gate,) = shown["gates"]
    assert (gate["asked"], gate["passed"], gate["value"], gate["closest"]) == (2, 1, 0.5, 0.5)
    assert [one["target"] for one in shown["transitions"]] == ["GRAFTING", "TRAINING", "GERMINATED"]
    assert [alert["text"] for alert in shown["alerts"]] == ["the disk is <b>slow</b>"]
    json.dumps(shown, allow_nan=False)


def test_the_time_left_is_the_mean_s_until_the_run_has_gone_on_under_our_eyes() -> None:
    now = [0.0]
    state = RunState("mine", clock=lambda: now[0])
    state.take(story())
    assert state.snapshot()["left_s"] == 1.0 and state.snapshot()["steps_per_second"] == 10.0
    now[0] = 1.0
    state.take([Metrics(tick=12, values={"cost/steps": 12.0})])
    assert state.snapshot()["steps_per_second"] == 2.0 and state.snapshot()["left_s"] == 4.0
    state.take([RunEnded(tick=20, status="KILLED", summary={})])
    assert state.snapshot()["left_s"] == 0.0 and state.snapshot()["status"] == "KILLED"


def test_a_run_that_goes_back_to_a_checkpoint_repeats_no_point_and_no_alert() -> None:
    state = RunState("mine")
    state.take(story())
    state.take(story())
    shown = state.snapshot()
    assert [tick for tick, _ in shown["curves"]["train/loss"]] == list(range(1, 11))
    assert len(shown["alerts"]) == 1


def test_curves_and_numbers_stay_small_and_finite() -> None:
    state = RunState("mine")
    for tick in range(10_000):
        state.take([Metrics(tick=tick, values={"train/loss": math.nan if tick % 2 else 1.0})])
    curve = state.snapshot()["curves"]["train/loss"]
    assert len(curve) <= 2 * POINTS and curve[0][0] == 0 and curve[-1] == [9_999, None]


def test_seeds_that_rest_again_are_only_counted_and_the_last_stages_come_first() -> None:
    state = RunState("mine")
    state.take([*story(), telemetry(11, [Stage.FOSSILIZED, Stage.GRAFTING])])
    assert [seed["stage"] for seed in state.snapshot()["seeds"]] == ["FOSSILIZED", "GRAFTING"]
    state.take([moved(12, 1, Stage.CULLED, Stage.DORMANT), telemetry(13, [Stage.FOSSILIZED, Stage.DORMANT])])
    assert [seed["seed"] for seed in state.snapshot()["seeds"]] == [0]
