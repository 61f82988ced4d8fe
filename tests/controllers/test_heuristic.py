"""The heuristic: when it grows, where, how much, and what it learns from refusals and losses."""

from __future__ import annotations

import numpy as np
import pytest

from esper.controllers.bookkeeping import Plateau
from esper.controllers.health import Health
from esper.controllers.heuristic import HeuristicConfig
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import RunStarted, Telemetry

DEAD = (0.0, 1.0, 0.9)  # variance, near zero, correlation
LIVELY = (2.0, 0.0, 0.0)


def _grow(run, sick=(), until=100, **settings):
    ran = run(HeuristicConfig(**settings).build(0))
    ran.health |= dict.fromkeys(sick, DEAD)
    return ran.start().until(until)


def test_it_germinates_the_neediest_seeds_at_the_set_fraction(run):
    ran = _grow(run, sick=[("fc2", 1), ("fc1", 3)], germinate_at="10%", count=2)
    # fc2's other seed halves that site's mean variance and fc1's three others less, but a dead chunk scores the same.
    assert ran.germinated == {11: [("fc1", 3), ("fc2", 1)]}


def test_the_score_is_the_stated_formula():
    rows = [(2.0, 0.25, -0.5), (0.0, 1.0, 0.0), (4.0, 0.0, 1.0)]
    health = Health()
    health.observe(_telemetry(rows))
    need = health.need("fc1", (0.6, 0.3, 0.1))
    assert need[0] == pytest.approx(0.6 * 0.5 + 0.3 * 0.25 + 0.1 * 0.5)
    assert need[1] == pytest.approx(0.6 * 1.0 + 0.3 * 1.0)
    assert need[2] == pytest.approx(0.6 / 3 + 0.1)
    health.observe(_telemetry([(3.0, 0.25, -0.5), *rows[1:]]))
    usual = (2.1 + 0.0 + 4.0) / 3
    assert health.need("fc1", (1.0, 0.0, 0.0))[0] == pytest.approx(1.0 / (1.0 + 2.1 / usual))


def test_a_seed_whose_sensor_fails_has_no_score_until_it_works_again():
    health = Health()
    health.observe(_telemetry([(1.0, 0.0, 0.0), (float("nan"), 0.0, 0.0)]))
    assert list(health.need("fc1", (1, 1, 1))) == [0]
    health.observe(_telemetry([(float("inf"), 0.0, 0.0), (1.0, 0.0, 0.0)]))
    assert list(health.need("fc1", (1, 1, 1))) == [1]
    assert health.need("elsewhere", (1, 1, 1)) == {}


def test_a_site_without_any_variance_still_has_scores():
    health = Health()
    health.observe(_telemetry([(0.0, 0.5, 0.0)]))
    assert health.need("fc1", (0.6, 0.3, 0.1)) == {0: pytest.approx(0.75)}


def _telemetry(rows):
    data = np.array([rows], dtype="<f4")
    return Telemetry(site="fc1", ticks=[1], seeds=len(rows), columns=["variance", "near_zero", "correlation"], data=data.tobytes())


def test_nothing_germinates_where_nothing_is_measured(run):
    ran = _grow(run, sick=(), germinate_at="10%", count=2)
    assert len(ran.germinated[11]) == 2
    blind = run(HeuristicConfig(count=2).build(0), "blind")
    blind.health = dict.fromkeys(blind.health, (float("nan"),) * 3)
    assert blind.start().until(40).germinated == {}


def test_a_plateau_of_the_metric_starts_a_wave(run):
    def metrics(tick):
        return {"validation/accuracy": min(tick, 30) / 100}

    settings = {"germinate_at": ""} | {
        "plateau": "10step",
        "metric": "validation/accuracy",
        "direction": "max",
        "count": 1,
    }
    ran = run(HeuristicConfig(**settings, until="55%").build(0)).start().until(70, metrics)
    assert list(ran.germinated) == [41, 51]


def test_better_means_by_a_share_and_not_finite_means_nothing():
    plateau = Plateau("min", 0.1)
    assert plateau.lasts(5) == 0
    for tick, value in enumerate((1.0, 0.91, 0.89, float("nan"), float("-inf"), 0.82, -0.5)):
        plateau.observe(tick, value)
        assert plateau.best == [1.0, 1.0, 0.89, 0.89, 0.89, 0.89, -0.5][tick]
    assert plateau.lasts(9) == 3
    plateau.restart(8)
    assert plateau.lasts(9) == 1


def test_no_more_than_max_active_are_under_way_and_the_rest_follow(run):
    ran = _grow(run, until=20, count=4, max_active=3)
    assert [len(places) for places in ran.germinated.values()] == [3]
    ran.move(*ran.germinated[11][0], Stage.FOSSILIZED)
    ran.until(30)
    assert {tick: len(places) for tick, places in ran.germinated.items()} == {11: 3, 22: 1}


@pytest.mark.parametrize(
    ("settings", "every", "sentence"),
    [
        ({"germinate_at": "99%"}, 1, r"germinate_at=99% is tick 99, and nothing germinates after tick 50 of 100 \(controller\.until=50%\)"),
        ({"germinate_at": "100%", "until": "100%"}, 1, r"germinate_at=100% is tick 100, and nothing germinates after tick 99 of 100"),
        ({"germinate_at": "", "plateau": "60%"}, 1, r"plateau=60% lasts 60 ticks, and nothing germinates after tick 50"),
        ({}, 51, r"first telemetry.*comes at tick 51 \(telemetry\.every\), and nothing germinates after tick 50.*lower telemetry\.every"),
    ],
)
def test_times_at_which_nothing_can_germinate_are_refused_when_the_run_starts(run, settings, every, sentence):
    ran = run(HeuristicConfig(**settings).build(0))
    for site in ran.sites:
        site["telemetry_every"] = every
    with pytest.raises(UserError, match=sentence):
        ran.start().until(1)


def test_nothing_germinates_after_until(run):
    ran = run(HeuristicConfig(count=4, max_active=1, until="20%").build(0)).start().until(25)
    ran.move(*ran.germinated[11][0], Stage.FOSSILIZED)
    assert list(ran.until(90).germinated) == [11]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"max_parameters": 250}, [("fc1", 0), ("fc1", 1)]),  # 100 each; fc2's cost 300
        ({"max_growth": 0.35}, [("fc2", 0)]),  # 350 of the host's 1000
        ({"max_growth": 0.45}, [("fc2", 0), ("fc1", 0)]),
        ({"max_growth": 9.0, "max_parameters": 100}, [("fc1", 0)]),
        ({"max_parameters": 12, "blueprint": "affine"}, [("fc2", 0), ("fc2", 1), ("fc1", 0), ("fc1", 1)]),
    ],
)
def test_the_neediest_that_fit_the_budget_are_taken(run, limit, expected):
    ran = _grow(run, sick=[("fc2", 0), ("fc2", 1)], until=20, **limit)
    asked = [place for places in ran.germinated.values() for place in places]
    # With fc2 wholly dead, its variance says nothing and the rest of the score puts it first.
    assert asked == expected


def test_a_budget_that_no_branch_fits_is_refused(run):
    with pytest.raises(UserError, match=r"max_parameters=1 .* the smallest branch has 2, so nothing would ever germinate"):
        _grow(run, sick=[], until=20, max_parameters=1, blueprint="affine")


def test_what_is_kept_goes_on_counting_and_what_is_lost_does_not(run):
    ran = run(HeuristicConfig(max_parameters=300, count=6, max_active=6, embargo="30step").build(0)).start().until(20)
    assert ran.germinated == {11: [("fc1", 0), ("fc1", 1), ("fc1", 2)]}
    ran.move("fc1", 0, Stage.FOSSILIZED)
    assert len(ran.until(25).germinated) == 1
    ran.move("fc1", 1, Stage.CULLED)
    assert ran.until(30).germinated[27] == [("fc1", 3)]
    assert ran.runner.controller.budget.used == 300


def test_a_refused_seed_rests_and_another_takes_its_turn(run):
    ran = run(HeuristicConfig(count=1, embargo="20step").build(0))
    ran.refuse = {("fc1", 0)}
    ran.health[("fc1", 0)] = DEAD
    ran.start().until(50)
    # fc2 comes next: beside a dead neighbour, fc1's others vary more than is usual for their site.
    assert ran.germinated == {11: [("fc1", 0)], 12: [("fc2", 0)]}


def test_a_culled_seed_is_left_alone_for_the_embargo(run):
    ran = run(HeuristicConfig(count=1, germinate_at="", plateau="5step", embargo="25step", max_active=9).build(0))
    ran.health |= {("fc1", 0): DEAD}
    ran.start().until(13, lambda tick: {"validation/loss": 1.0})
    ran.move("fc1", 0, Stage.CULLED)
    ran.move("fc1", 0, Stage.DORMANT)
    ran.until(50, lambda tick: {"validation/loss": 1.0})
    again = [tick for tick, places in ran.germinated.items() if ("fc1", 0) in places]
    assert again[0] == 7
    assert 13 + 25 < again[1] <= 13 + 25 + 7


@pytest.mark.parametrize("cut", [5, 11, 12, 30])
def test_a_resumed_run_decides_what_an_undisturbed_one_decides(run, reborn, cut):
    config = HeuristicConfig(count=2, plateau="8step", max_active=6, max_parameters=700)

    def metrics(tick):
        return {"validation/loss": 1.0 if tick > 20 else 2.0 - tick / 20}

    def begin(controller, name):
        ran = run(controller, name)
        ran.health |= {("fc1", 1): DEAD, ("fc2", 0): (0.5, 0.5, float("nan")), ("fc1", 2): LIVELY}
        return ran

    whole = begin(config.build(0), "whole").start().until(60, metrics)
    first = begin(config.build(0), "first").start().until(cut, metrics)
    second = begin(reborn(first.runner.controller, config), "second")
    second.stages = dict(first.stages)
    second.port.load_state(first.port.state())
    second.start(tick=cut).until(60, metrics)
    assert first.germinated | second.germinated == whole.germinated
    assert len(whole.germinated) > 2


def test_a_blueprint_that_fits_nowhere_is_refused_with_those_that_do(run):
    ran = run(HeuristicConfig(blueprint="conv").build(0)).start()
    with pytest.raises(UserError, match="blueprint=conv fits no site of this host; blueprints that do: affine, mlp"):
        ran.until(1)


def test_a_run_that_goes_on_tells_the_stages_to_a_controller_that_was_not_there():
    controller = HeuristicConfig().build(0)
    site = {"name": "fc1", "kind": "linear", "width": 8, "seeds": 2, "blueprints": {}, "stages": [7, 3], "telemetry_every": 1}
    controller.observe(RunStarted(tick=50, total_ticks=100, sites=[site]))
    assert controller.view.active() == [("fc1", 1)]
    assert controller.view.seeds(stage=Stage.FOSSILIZED) == [("fc1", 0)]


def test_the_order_is_that_of_a_sort_of_all_seeds_however_many_have_a_site_no_health_or_the_same_score():
    draws = np.random.default_rng(4)
    for trial in range(20):
        sizes = draws.integers(1, 7, size=5).tolist()
        made = HeuristicConfig(count=3).build(0)
        sites = [{"name": f"s{n}", "seeds": size, "telemetry_every": 1, "blueprint": "mlp"} for n, size in enumerate(sizes)]
        made.places.observe(RunStarted(tick=0, total_ticks=100, sites=sites))
        expected = []
        for n, size in enumerate(sizes):
            rows = draws.integers(0, 3, size=(size, 3)).astype("<f4")
            rows[draws.random(size) < 0.2] = np.nan
            columns = ["variance", "near_zero", "correlation"]
            made.health.observe(Telemetry(site=f"s{n}", ticks=[1], seeds=size, columns=columns, data=rows.tobytes()))
            expected += [((f"s{n}", seed), need) for seed, need in made.health.need(f"s{n}", (0.6, 0.3, 0.1)).items()]
        expected.sort(key=lambda entry: -entry[1])
        for room in (1, 3, 50):
            assert list(made._ranked(1, room)) == expected, (trial, room)


def test_means_run_on_alike_with_and_without_gaps_beside_them():
    whole, gappy = Health(), Health()
    draws = np.random.default_rng(5)
    for _ in range(6):
        rows = [tuple(row) for row in draws.random((3, 3))]
        whole.observe(_telemetry(rows))
        gappy.observe(_telemetry([*rows[:2], (float("nan"), 0.0, 0.0)]))
    assert np.array_equal(whole.means("fc1", 3)[:2], gappy.means("fc1", 3)[:2])
    again = Health()
    again.load_state(gappy.state())
    again.observe(_telemetry([(1.0, 0.0, 0.0)] * 3))
    assert np.isfinite(again.means("fc1", 3)).all() and again.need("fc1", (1, 0, 0)).keys() == {0, 1, 2}
