"""The control arm: as many as asked for, by its own lot, the same lot every time."""

from __future__ import annotations

import random

import pytest

from esper.controllers.random import RandomConfig
from esper.errors import UserError
from esper.lifecycle.stages import Stage


def test_it_germinates_the_number_asked_for_within_the_span(run):
    config = RandomConfig(count=5, earliest="20%", latest="60%")
    ran = run(config.build(3)).start().until(100)
    places = [place for places in ran.germinated.values() for place in places]
    assert len(places) == len(set(places)) == 5
    assert all(21 <= tick <= 61 for tick in ran.germinated)
    assert len(ran.germinated) > 1


def test_the_lot_depends_on_the_seed_alone(run):
    def lots(seed, name):
        return run(RandomConfig(count=3, earliest="1%", latest="90%").build(seed), name).start().until(100).germinated

    once = lots(1, "a")
    random.seed(0)
    assert lots(1, "b") == once
    assert lots(2, "c") != once


def test_places_are_drawn_evenly(run):
    drawn = {}
    for seed in range(120):
        for places in run(RandomConfig(count=1).build(seed), f"r{seed}").start().until(12).germinated.values():
            drawn[places[0]] = drawn.get(places[0], 0) + 1
    assert len(drawn) == 6
    assert sum(drawn.values()) == 120
    assert min(drawn.values()) >= 8  # 20 expected each; 8 is three standard deviations away


def test_a_refused_place_is_replaced_by_another_and_rests(run):
    ran = run(RandomConfig(count=2, embargo="100%").build(0))
    ran.refuse = {("fc1", 0), ("fc1", 1), ("fc1", 2), ("fc2", 0)}
    ran.start().until(60)
    asked = [place for places in ran.germinated.values() for place in places]
    assert len(asked) == len(set(asked))
    assert sum(stage == Stage.GERMINATED for stage in ran.stages.values()) == 2


def test_it_gives_up_when_no_place_is_left_and_stays_on_the_sites_it_was_given(run):
    ran = run(RandomConfig(count=9, site="fc2").build(0)).start().until(30)
    assert sorted(place for places in ran.germinated.values() for place in places) == [("fc2", 0), ("fc2", 1)]


@pytest.mark.parametrize("cut", [15, 40, 70])
def test_a_resumed_run_draws_what_an_undisturbed_one_draws(run, reborn, cut):
    config = RandomConfig(count=5, earliest="10%", latest="80%", blueprint="affine")
    whole = run(config.build(4), "whole").start().until(100)
    first = run(config.build(4), "first").start().until(cut)
    second = run(reborn(first.runner.controller, config, 4), "second")
    second.stages = dict(first.stages)
    second.port.load_state(first.port.state())
    second.start(tick=cut).until(100)
    assert first.germinated | second.germinated == whole.germinated


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"site": "zzz"}, r"controller\.site=zzz matches no site; there are: fc1, fc2\."),
        ({"blueprint": "nope"}, r"controller\.blueprint=nope fits no site that controller\.site=\* matches; blueprints that do: affine"),
        ({"earliest": "100%", "latest": "100%"}, r"earliest=100% is tick 100, and what is decided after tick 99 comes too late"),
    ],
)
def test_what_could_germinate_nothing_is_refused_when_the_run_starts(run, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        run(RandomConfig(**settings).build(0)).start().until(1)


def test_a_run_whose_blueprint_does_not_fit_the_chosen_sites_is_refused(run):
    ran = run(RandomConfig(site="fc2").build(0))
    del ran.sites[1]["blueprints"]["mlp"]
    with pytest.raises(UserError, match=r"The run's blueprint fits no site that controller\.site=fc2 matches; blueprints that do: affine"):
        ran.start().until(1)


def test_the_last_time_drawn_is_one_that_still_counts(run):
    ran = run(RandomConfig(count=5, earliest="99%", latest="100%").build(0)).start().until(100)
    assert sum(map(len, ran.germinated.values())) == 5


def test_a_span_that_ends_before_it_begins_is_refused(run):
    ran = run(RandomConfig(earliest="50%", latest="10%").build(0)).start()
    with pytest.raises(UserError, match=r"earliest=50% is after controller\.latest=10%"):
        ran.until(1)
