"""Flags in the engine: a site at which growth is off carries seeds that stay dormant, and failing again and again turns it off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, germinate, short

from esper.controllers.view import RunView
from esper.errors import UserError
from esper.feature_flags import Flags, FlagsConfig, GrowthFlag
from esper.lifecycle import Stage
from esper.messages import ReplaceBranch, RunStarted


def flagged(**growth: Any) -> FlagsConfig:
    return FlagsConfig(growth=GrowthFlag(**growth))


def test_nothing_germinates_where_growth_is_off_and_the_refusal_says_why():
    loop = Loop(settings={"flags": flagged(block=["fc1"])}, commands={1: [germinate("fc1"), germinate("fc2")]}).run(2)
    assert loop.port.acks["germinate-fc1-0"] == ("refused", "growth is off at 'fc1': flags.growth.block names fc1")
    assert [branch.site for branch in loop.grow.registry.branches.entries] == [1]


def test_a_pattern_is_compared_with_the_models_class():
    loop = Loop(settings={"flags": flagged(block=["net/fc1", "cnn/nowhere"])})
    assert not loop.grow.registry.flags.on("growth", "fc1")
    with pytest.raises(UserError, match=r"flags.growth.block=\[fc9\] matches no site of the Net; there are fc1, fc2"):
        Loop(settings={"flags": flagged(block=["fc9"])})
    with pytest.raises(UserError, match=r"flags is a dict; it takes an esper\.feature_flags\.FlagsConfig"):
        Loop(settings={"flags": {"growth": False}})


def test_controllers_see_no_dormant_seed_where_growth_is_off():
    cards = Loop(settings={"flags": flagged(block=["fc1"])}).grow.observer.site_cards()
    view = RunView()
    view.observe(RunStarted(tick=0, total_ticks=10, sites=cards))
    assert view.seeds(stage=Stage.DORMANT) == [("fc2", 0), ("fc2", 1)] and len(view.seeds()) == 4


def test_a_branch_is_not_replaced_where_growth_is_off():
    loop = Loop(commands={1: [germinate()]})
    loop.until(Stage.FOSSILIZED)
    loop.grow.registry.flags = Flags(flagged(percent=0.0))
    answer = loop.grow.executor.apply(ReplaceBranch(id="r", site="fc1", seed=0), loop.grow.tick_number)
    assert answer == ("refused", "growth is off at 'fc1': flags.growth.percent=0")


def test_a_site_whose_branches_fail_again_and_again_grows_no_more_and_a_resumed_run_knows():
    def settings(**more: Any) -> dict[str, Any]:
        return {"lifecycle": short(embargo="1step", fade="0step"), "flags": flagged(failures=2), **more}

    loop = Loop(settings=settings())
    for attempt in range(3):
        loop.port.script[loop.grow.tick_number + 1] = [germinate(id=f"g{attempt}")]
        loop.run(3)
        with torch.no_grad():
            for bank in loop.grow.registry.banks(0).values():
                next(iter(bank.stacks.values())).fill_(float("nan"))
        loop.run(4)
    assert [loop.port.acks[f"g{attempt}"][0] for attempt in range(3)] == ["applied", "applied", "refused"]
    reason = "growth is off at 'fc1': it failed 2 times, and flags.growth.failures=2"
    assert loop.port.acks["g2"][1] == reason
    assert [alert.text for alert in loop.port.alerts if alert.code == "growth_off"] == [
        "nothing grows at fc1 from here on: it failed 2 times, and flags.growth.failures=2"
    ]
    again = Loop(settings=settings(state=loop.grow.state()))
    assert again.grow.executor.apply(germinate(), again.grow.tick_number) == ("refused", reason)
    assert again.grow.executor.apply(germinate("fc2"), again.grow.tick_number)[0] == "applied"
