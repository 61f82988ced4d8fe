"""Credit: what a branch was worth, and that nothing else earns it. The judge's answers here are those of the situations named."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from esper.controllers.credit import LEAST_COST, Credit, Ended, OwnLearning
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Metrics, RunStarted, Telemetry, Transition

TOTAL = 1000
BLUEPRINTS = {"mlp": {"parameters": 300, "macs": 300}, "affine": {"parameters": 100, "macs": 100}}
STAGES = {"germinated": Stage.GERMINATED, "grafting": Stage.GRAFTING, "fossilized": Stage.FOSSILIZED}


def credit(rent: float = 0.1, trend: float = 0.5) -> Credit:
    """A run of one site, whose mean branch has 200 parameters."""
    made = Credit("validation/loss", rent, trend)
    site = {"name": "fc1", "seeds": 4, "blueprint": "mlp", "blueprints": BLUEPRINTS}
    made.observe(RunStarted(tick=0, total_ticks=TOTAL, sites=[site]))
    return made


def move(made: Credit, tick: int, target: Stage, seed: int = 0, blueprint: str = "mlp") -> Ended | None:
    event = Transition(tick=tick, site="fc1", seed=seed, branch=0, source=0, target=target, cause="", blueprint=blueprint)
    return made.observe(event)


def answer(made: Credit, tick: int, seed: int = 0, **gates: float) -> None:
    for gate, value in gates.items():
        made.observe(GateResult(tick=tick, site="fc1", seed=seed, branch=0, gate=gate, value=value, threshold=0.0, passed=True))


def loss(made: Credit, curve: dict[int, float]) -> None:
    for tick, value in curve.items():
        made.observe(Metrics(tick=tick, values={"validation/loss": value}))


def alpha(made: Credit, tick: int, value: float, seed: int = 0) -> None:
    rows = np.zeros((1, 4, 2), "<f4")
    rows[0, seed, 1] = value
    made.observe(Telemetry(site="fc1", ticks=[tick], seeds=4, columns=["stage", "alpha"], data=rows.tobytes()))


def life(
    made: Credit, born: int = 100, blending: int = 120, full: int = 140, end: int = 300, blueprint: str = "mlp", **gates: float
) -> Ended:
    """A branch that is kept, with these answers of the gates at its end."""
    move(made, born, Stage.GERMINATED, blueprint=blueprint)
    move(made, blending, Stage.GRAFTING)
    alpha(made, full, 1.0)
    answer(made, end, **gates)
    ended = move(made, end, Stage.FOSSILIZED)
    assert ended is not None
    return ended


def flat(made: Credit, value: float = 1.0) -> Credit:
    """A host that has learnt what it can."""
    loss(made, dict.fromkeys(range(0, 121, 20), value))
    return made


def test_a_kept_branch_earns_its_gain_for_its_cost_less_its_rent():
    ended = life(flat(credit(), 2.0), final_gain=0.2, no_harm=0.3)
    assert ended.kept and ended.gain == pytest.approx(0.2 / 2.2), "a share of the loss without it"
    assert ended.cost == pytest.approx(1.5), "300 of a mean of 200"
    assert ended.squat == pytest.approx(40 / TOTAL), "alpha was 0 from tick 100 to 140"
    assert ended.reward == pytest.approx(0.2 / 2.2 / 1.5 - 0.1 * 0.04)


def test_the_same_gain_is_worth_more_from_a_smaller_branch_but_not_without_end():
    large, small = (life(flat(credit()), blueprint=name, final_gain=0.1, no_harm=0.1) for name in ("mlp", "affine"))
    assert small.reward > 2.5 * large.reward
    made = credit()
    assert made.cost("fc1", "affine") == pytest.approx(0.5) and made.cost("fc1", "mlp") >= LEAST_COST


def test_the_hosts_own_learning_earns_nothing():
    """The loss falls by itself all the time; off and on are the same, so the judge sees no gain. Nor does a branch win by being there."""
    made = credit()
    loss(made, {tick: 2.0 * 0.995**tick for tick in range(0, 301, 20)})
    ended = life(made, final_gain=0.0, no_harm=0.7)
    assert ended.gain == 0.0 and ended.reward < 0.0


def test_a_host_that_leans_on_a_useless_branch_earns_it_nothing():
    """Off − on is large, since the host has come to need it; but with it the host is where it was before the blending."""
    assert life(flat(credit()), final_gain=0.8, no_harm=0.0).reward < 0.0
    assert life(flat(credit()), final_gain=0.8, no_harm=-0.2).gain < 0.0
    useful = life(flat(credit()), final_gain=0.2, no_harm=0.2)
    assert useful.reward > life(flat(credit()), final_gain=0.8, no_harm=0.01).reward


def test_leaning_does_not_hide_behind_the_hosts_own_learning():
    """The loss fell by as much as the host would have learnt by itself, so what the host leans on has brought nothing."""
    curve = {tick: 1.0 + 1.0 * 0.99**tick for tick in range(0, 121, 20)}
    fallen = curve[120] - (1.0 + 0.99**300)
    leaning, useful = credit(trend=1.0), credit(trend=1.0)
    for made in (leaning, useful):
        loss(made, curve)
    useless = life(leaning, final_gain=0.5, no_harm=fallen)
    assert abs(useless.gain) < 0.02, "the fall is the one that was to be expected"
    assert life(useful, final_gain=0.2, no_harm=fallen + 0.2).gain > 5 * abs(useless.gain)


def test_an_early_fossil_earns_no_more_than_a_late_one_of_the_same_share():
    early, late = flat(credit(rent=0.0), 2.0), flat(credit(rent=0.0), 0.4)
    assert life(early, final_gain=0.2, no_harm=0.2).reward == pytest.approx(life(late, final_gain=0.04, no_harm=0.04).reward)


def test_an_early_fossil_of_a_host_that_learns_fast_earns_less_than_the_judge_says():
    made = credit()
    loss(made, {0: 2.3, 20: 1.9, 40: 1.6, 60: 1.4, 80: 1.25, 100: 1.15, 120: 1.1})
    ended = life(made, born=40, blending=60, full=80, final_gain=0.4, no_harm=0.5)
    assert ended.gain < 0.6 * 0.4 / 1.1


def test_branches_that_lean_on_each_other_are_told_apart():
    """Each is worth more than the whole loss that is left, since without it the others are nothing."""
    small, large = (life(flat(credit(), 0.1), final_gain=worth, no_harm=5.0) for worth in (0.2, 2.0))
    assert 0.6 < small.gain < 0.7 < 0.95 < large.gain < 1.0


def test_a_host_that_has_just_begun_to_fall_steeply_is_not_expected_to_fall_below_nothing():
    """The loss falls faster and faster before the blending, and has nearly reached its end when the branch is kept."""
    made = credit()
    loss(made, {0: 5.5, 20: 5.3, 40: 5.0, 60: 4.5, 80: 3.8, 100: 2.9, 120: 2.0} | {150: 0.5, 300: 0.2})
    ended = life(made, final_gain=0.3, no_harm=1.8)
    assert ended.gain == pytest.approx(0.3 / 0.5), "at least half of the fall is not the host's own"


def test_a_loss_that_may_be_negative_is_extrapolated_freely():
    learning = OwnLearning()
    for tick, value in ((0, 1.0), (50, 0.2), (100, -0.5)):
        learning.observe(tick, value)
    assert learning.fall(100, 200) > 1.0


def test_squatting_at_small_alpha_costs_rent_until_the_run_ends():
    made = flat(credit())
    move(made, 100, Stage.GERMINATED)
    move(made, 110, Stage.GRAFTING)
    for tick in range(120, 1001, 20):
        alpha(made, tick, 0.02)
    answer(made, 1000, gain=0.5)
    (left,) = made.unfinished(1000)
    assert not left.kept and left.gain == 0.0
    assert left.reward == pytest.approx(-0.1 * left.squat) and left.squat > 0.88
    (again,) = made.unfinished(1000)
    assert again.reward == left.reward, "asking changes nothing"
    quick = life(flat(credit()), final_gain=0.1, no_harm=0.1)
    slow = life(flat(credit()), full=290, final_gain=0.1, no_harm=0.1)
    assert quick.reward > slow.reward


@pytest.mark.parametrize("target", [Stage.CULLED, Stage.CANCELLED])
def test_what_is_not_kept_has_gained_nothing(target: Stage):
    made = flat(credit())
    move(made, 100, Stage.GERMINATED)
    answer(made, 200, gain=0.9)
    ended = move(made, 210, target)
    assert ended is not None and not ended.kept and ended.gain == 0.0 and ended.reward < 0.0


def test_a_branch_that_was_rolled_back_answers_for_its_harm():
    made = flat(credit())
    move(made, 100, Stage.GERMINATED)
    answer(made, 200, gain=-0.4)
    ended = move(made, 210, Stage.ROLLED_BACK)
    assert ended is not None and ended.gain == pytest.approx(-0.4)


def test_answers_that_are_missing_or_not_finite_earn_nothing():
    assert life(flat(credit()), final_gain=math.nan, no_harm=0.5).gain == 0.0
    assert life(flat(credit()), final_gain=0.5, no_harm=math.nan).gain == 0.0
    assert life(flat(credit()), final_gain=0.5).gain == 0.0


def test_own_learning_is_extrapolated_from_the_time_before_alone():
    learning = OwnLearning()
    assert learning.fall(0, 100) == 0.0
    for tick in range(0, 101, 10):
        learning.observe(tick, 1.0 + 0.98**tick)
    expected = 0.98**100 - 0.98**200
    assert learning.fall(100, 200) == pytest.approx(expected, rel=1e-6)
    learning.observe(150, -5.0)
    assert learning.fall(100, 200) == pytest.approx(expected, rel=1e-6)
    rising = OwnLearning()
    for tick, value in ((0, 1.0), (50, 1.1), (100, 1.2)):
        rising.observe(tick, value)
    assert rising.fall(100, 200) == 0.0


def test_lives_go_on_from_json():
    made = flat(credit())
    move(made, 100, Stage.GERMINATED)
    alpha(made, 120, 0.5)
    again = credit()
    again.load_state(json.loads(json.dumps(made.state())))
    for one in (made, again):
        answer(one, 300, final_gain=0.1, no_harm=0.2)
    assert move(made, 300, Stage.FOSSILIZED) == move(again, 300, Stage.FOSSILIZED)
