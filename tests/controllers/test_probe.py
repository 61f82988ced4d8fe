"""The probe: candidates grow together, the first look at each ranks them, and all but the best for their cost go."""

from __future__ import annotations

import json
from typing import Any

import pytest

from esper.controllers.probe import ProbeConfig
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import EmergencyStop, GateResult, Germinate

PLACES = [("fc1", 0), ("fc1", 1), ("fc1", 2), ("fc1", 3), ("fc2", 0), ("fc2", 1)]


def probe(seed: int = 0, **settings: Any) -> Any:
    return ProbeConfig(**({"germinate_at": "5%", "candidates": 6, "keep": 2, "pause": "50%"} | settings)).build(seed)


def judge(ran: Any, gains: dict[tuple[str, int], float], look: int = 1) -> None:
    for (site, seed), gain in gains.items():
        ran.port.emit(
            GateResult(tick=ran.tick, site=site, seed=seed, branch=0, gate="gain", value=gain, threshold=0.0, passed=gain > 0, look=look)
        )


def begun(run: Any, until: int = 10, **settings: Any) -> Any:
    """A run whose candidates have germinated at tick 6."""
    return run(probe(**settings)).start().until(until)


def dismissed(ran: Any) -> list[tuple[str, int]]:
    """Stopped by the one command that ends a branch in every stage: FINE_TUNING, which a loser may have reached, has a least age."""
    commands = [command for commands in ran.handed.values() for command in commands if isinstance(command, EmergencyStop)]
    return [(command.select.site, command.select.seeds[0]) for command in commands]


def test_candidates_are_spread_over_the_sites_and_blueprints(run):
    ran = begun(run, candidates=4, blueprints=["mlp", "affine"])
    commands = ran.handed[6]
    assert sorted(command.site for command in commands) == ["fc1", "fc1", "fc2", "fc2"]
    assert sorted(command.blueprint for command in commands) == ["affine", "affine", "mlp", "mlp"]
    assert [command.why["candidate"] for command in commands] == [0, 1, 2, 3]


def test_those_that_have_gained_most_for_their_cost_stay(run):
    ran = begun(run)
    for place in PLACES:
        ran.move(*place, Stage.EVALUATING, "mlp")
    # A branch at fc2 has three times the parameters of one at fc1.
    judge(ran, {("fc1", 0): 0.1, ("fc1", 1): 0.2, ("fc1", 2): -0.1, ("fc1", 3): 0.05, ("fc2", 0): 0.35})
    ran.until(12)
    assert dismissed(ran) == [], "one has not been judged yet"
    judge(ran, {("fc2", 1): 0.55})
    ran.until(14)
    lost = [("fc1", 0), ("fc1", 2), ("fc1", 3), ("fc2", 0)]
    assert sorted(dismissed(ran)) == lost, "0.55 / 300 is more than 0.1 / 100 and 0.35 / 300, and 0.2 / 100 is more still"


def test_what_gains_nothing_does_not_stay_even_if_nothing_is_better(run):
    ran = begun(run)
    for place in PLACES:
        ran.move(*place, Stage.FINE_TUNING, "mlp")
    judge(ran, dict.fromkeys(PLACES, 0.0) | {("fc1", 0): float("nan")})
    assert len(dismissed(ran.until(14))) == 6


def test_what_is_not_judged_in_time_has_lost_in_whatever_stage_it_is(run):
    ran = begun(run, trial="10%")
    stages = [Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.CULLED]
    for place, stage in zip(PLACES, stages, strict=True):
        ran.move(*place, stage, "mlp")
    judge(ran, {("fc1", 1): 0.1}, look=2)
    assert sorted(dismissed(ran.until(18))) == sorted(PLACES[:5])


def test_trials_follow_each_other_until_their_time_is_over(run):
    ran = run(probe(pause="5%", until="30%", embargo="1%")).start().until(10)
    for _ in range(60):
        judge(ran, dict.fromkeys(PLACES, -1.0))
        ran.until(ran.tick + 1)
        for place in PLACES:
            if ran.stages[place] is not Stage.DORMANT:
                ran.move(*place, Stage.CULLED, "mlp")
                ran.move(*place, Stage.DORMANT)
    starts = sorted(ran.germinated)
    assert len(starts) > 2 and starts[-1] <= 31
    assert len({tuple(places) for places in ran.germinated.values()}) > 1, "another order each time"


def test_refused_candidates_are_not_waited_for(run):
    ran = run(probe())
    ran.refuse = set(PLACES[1:])
    ran.start().until(10)
    ran.move("fc1", 0, Stage.EVALUATING, "mlp")
    judge(ran, {("fc1", 0): 0.1})
    ran.until(13)
    assert ran.runner.controller.running == {} and dismissed(ran) == []


def test_it_repeats_and_goes_on_from_json(run):
    first, second, other = (run(probe(seed), name).start().until(10) for seed, name in ((0, "first"), (0, "second"), (1, "other")))
    assert first.handed == second.handed != other.handed
    state = json.loads(json.dumps(second.runner.state()))
    again = run(probe(), "again")
    again.runner.load_state(state)
    again.stages = dict(second.stages)
    again.start(10)
    for ran in (first, again):
        for place in PLACES:
            ran.move(*place, Stage.EVALUATING, "mlp")
        judge(ran, {place: 0.01 * number for number, place in enumerate(PLACES, 1)})
        ran.until(14)
    assert dismissed(first) == dismissed(again) != []


def test_budgets_leave_out_what_is_too_large(run):
    ran = begun(run, blueprints=["mlp", "affine"], max_parameters=110)
    commands = [command for command in ran.handed[6] if isinstance(command, Germinate)]
    sizes = {"fc1": {"mlp": 100, "affine": 2}, "fc2": {"mlp": 300, "affine": 2}}
    assert 0 < sum(sizes[command.site][command.blueprint] for command in commands) <= 110


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": 6}, "leaves nothing to rank"),
        ({"strategies": ["lineal"]}, "controller.strategies names 'lineal'"),
        ({"trial": "2epoch"}, "cannot see epochs"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_it_is_built(settings, text):
    with pytest.raises(UserError, match=text):
        probe(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"germinate_at": "60%"}, "give an earlier time"),
        ({"blueprints": ["conv"]}, "fits no site"),
        ({"sites": ["layers.*"]}, "matches no site"),
        ({"max_parameters": 1}, "nothing would ever germinate"),
    ],
)
def test_settings_under_which_no_trial_could_begin_end_the_run_at_its_start(run, settings, text):
    with pytest.raises(UserError, match=text):
        run(probe(**settings)).start().until(1)


def test_it_germinates_no_more_than_the_run_allows(run):
    ran = run(probe(most=5, candidates=3, pause="5%", embargo="1%")).start().until(10)
    for _ in range(40):
        judge(ran, dict.fromkeys(PLACES, -1.0))
        ran.until(ran.tick + 1)
        for place in PLACES:
            if ran.stages[place] is not Stage.DORMANT:
                ran.move(*place, Stage.CULLED, "mlp")
                ran.move(*place, Stage.DORMANT)
    assert sum(map(len, ran.germinated.values())) == 5
