"""A branch, strategy or controller whose own code raises: the host cannot feel it, it is said once, and what repeats it goes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from growing import Loop, batch, build, germinate, same, sample_loss, short

from esper.blueprints import MLP, Block
from esper.controllers.runner import Contained
from esper.engine.attach import attach
from esper.engine.measurements import REPEATED
from esper.grafting import Plan
from esper.lifecycle import Stage

S = Stage


@dataclass
class Broken(MLP):
    """A blueprint with a fault in it: ``kind`` is raise, shape or backward, from the moment it is ``armed``."""

    name: str = "broken"
    kind: str = "raise"

    armed = False

    def forward(self, parameters: Any, x: Any) -> Any:
        y = super().forward(parameters, x)
        if not Broken.armed:
            return y
        if self.kind == "raise":
            raise RuntimeError("the user's own fault")
        return y[..., :1] if self.kind == "shape" else _Unlearnable.apply(y)


class _Unlearnable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("no way back")


@pytest.fixture(autouse=True)
def disarmed() -> Any:
    Broken.armed = False
    yield
    Broken.armed = False


def alone(steps: int) -> dict[str, torch.Tensor]:
    return Loop(seeds=False).run(steps).host_state()


@pytest.mark.parametrize(
    ("objective", "kind"),
    [("shadow", "raise"), ("shadow", "shape"), ("shadow", "backward"), ("functional_gradient", "raise"), ("reconstruction", "raise")],
)
def test_one_that_raises_while_it_learns_never_reaches_the_host(objective: str, kind: str, caplog: pytest.LogCaptureFixture):
    Broken.armed = True
    lifecycle = short(objective=objective, readiness=1.0, training_max="200step")
    loop = Loop(settings={"lifecycle": lifecycle, "blueprint": Broken(kind=kind), "sites": ["fc1"]}, commands={1: [germinate()]}).run(12)
    branch = loop.grow.registry.branches[0]
    assert branch.stage in (S.CULLED, S.DORMANT) and branch.raised == REPEATED and not branch.alive
    same(loop.host_state(), alone(12))
    cause = next(said.cause for said in loop.port.transitions if said.target == S.CULLED)
    assert cause.startswith(f"exceptions at {REPEATED} ticks; blueprint broken raised ")
    told = [said for said in loop.port.alerts if said.code == "part_raised"]
    assert len(told) == 1 and "fc1" in told[0].text, "one alert, however often it raises"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.levelno == logging.ERROR


@pytest.mark.parametrize("stage", [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING])
def test_a_blended_one_adds_nothing_and_goes(stage: Stage):
    patient = {"evaluating_min": "20step", "stabilization_min": "20step", "fine_tuning_min": "20step"}
    loop = Loop(settings={"lifecycle": short(**patient), "blueprint": Broken(), "sites": ["fc1"]}, commands={1: [germinate()]})
    branch = loop.until(stage, most=150)
    loop.step()
    data = batch(number=77)
    with loop.grow.registry.without(branch):
        expected = sample_loss(loop.model, data)
    Broken.armed = True
    assert torch.equal(sample_loss(loop.model, data), expected)
    for _ in range(REPEATED - 1):
        loop.step()
        assert branch.stage is not S.CULLED and branch.alive
    loop.step()
    assert branch.stage is (S.ROLLED_BACK if stage is S.STABILIZATION else S.CULLED)
    assert loop.port.transitions[-1].cause.startswith("exceptions at 3 ticks")


def test_a_fossil_stays_and_is_told_of():
    loop = Loop(settings={"blueprint": Broken(), "sites": ["fc1"]}, commands={1: [germinate()]})
    branch = loop.until(S.FOSSILIZED, most=150)
    Broken.armed = True
    loop.run(6)
    assert branch.stage is S.FOSSILIZED and branch.alive
    assert [said.code for said in loop.port.alerts] == ["part_raised"]


def test_what_was_said_before_a_stop_is_not_said_again():
    settings = {"blueprint": Broken(), "sites": ["fc1"]}
    loop = Loop(settings=settings, commands={1: [germinate()]})
    loop.until(S.FOSSILIZED, most=150)
    Broken.armed = True
    loop.run(2)
    assert [said.code for said in loop.port.alerts] == ["part_raised"]
    again = Loop(settings={**settings, "state": loop.grow.state()}).run(2)
    assert again.grow.registry.branches[0].raised > loop.grow.registry.branches[0].raised, "it went on raising"
    assert again.port.alerts == []


def test_a_block_is_contained_too():
    loop = Loop("cnn_group", settings={"blueprint": "block"})
    loop.port.script = {1: [germinate(loop.grow.registry.sites[0].name)]}
    branch = loop.until(S.GRAFTING)
    block = loop.grow.registry.layers[0].bank("block").blocks["0"]

    def fault(*_: Any) -> None:
        raise ValueError("a block's own fault")

    block.register_forward_pre_hook(fault)
    loop.run(REPEATED)
    assert branch.stage is S.CULLED and isinstance(loop.grow.registry.blueprints["block"], Block)


def test_a_neighbour_of_another_blueprint_lives_on_and_learns_the_same():
    lifecycle = short(readiness=1.0, training_max="200step", objective="reconstruction")
    settings = {"lifecycle": lifecycle, "blueprint": Broken(), "sites": ["fc1"]}
    Broken.armed = True
    loop = Loop(settings=settings, commands={1: [germinate(seed=0), germinate(seed=1, blueprint="mlp")]}).run(8)
    broken, other = loop.grow.registry.branches
    assert not broken.alive and other.stage is S.TRAINING and float(loop.grow.registry.layers[0].bank("mlp").steps[other.slot]) > 5


def test_debugging_raises_it_from_where_it_came():
    Broken.armed = True
    settings = {"lifecycle": short(readiness=1.0), "blueprint": Broken(), "sites": ["fc1"], "debug": True}
    loop = Loop(settings=settings, commands={1: [germinate()]})
    with pytest.raises(RuntimeError, match="the user's own fault") as raised:
        loop.run(5)
    assert any(entry.name == "forward" and "test_raising" in str(entry.path) for entry in raised.traceback)


def test_memory_that_cannot_be_had_is_not_the_branchs_own_fault(monkeypatch: pytest.MonkeyPatch):
    Broken.armed = True
    monkeypatch.setattr(Broken, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no more")))
    loop = Loop(settings={"blueprint": Broken(), "sites": ["fc1"]}, commands={1: [germinate()]})
    with pytest.raises(torch.OutOfMemoryError):
        loop.run(5)


class Rule:
    """A grafting rule that fails from its ``after``-th tick on, for ``times`` ticks."""

    signals = ("loss",)

    def __init__(self, after: int, times: int) -> None:
        self.ticks, self.after, self.times = 0, after, times

    def plan(self, state: Any, context: Any) -> Plan:
        self.ticks += 1
        if self.after <= self.ticks < self.after + self.times:
            raise KeyError("no such signal")
        return Plan(torch.ones(len(state)), {}, 1.0)


@pytest.mark.parametrize(("times", "ends"), [(2, S.STABILIZATION), (3, S.CULLED)])
def test_a_rule_that_raises_holds_the_ramp_and_repeating_it_culls(times: int, ends: Stage):
    loop = Loop(settings={"grafting": Rule(2, times), "lifecycle": short(stabilization_min="20step")}, commands={1: [germinate()]})
    branch = loop.until(S.GRAFTING)
    alphas = []
    while branch.stage is S.GRAFTING:
        loop.step()
        alphas.append(float(loop.grow.registry.branches.alpha[branch.id]))
    assert branch.stage is ends and alphas[0] == alphas[1] == alphas[2], "it holds while its rule raises"
    told = [said for said in loop.port.alerts if said.code == "part_raised"]
    assert len(told) == 1 and "grafting rule Rule raised KeyError" in told[0].text


class Decider:
    """A controller that fails when it hears or decides, at the given ticks."""

    def __init__(self, ticks: range) -> None:
        self.ticks, self.asked = ticks, 0

    def observe(self, message: Any) -> None: ...

    def decide(self, tick: int) -> list[Any]:
        self.asked += 1
        if tick in self.ticks:
            raise ZeroDivisionError("a controller's own fault")
        return [germinate(id=f"t{tick}")] if tick == 3 else []

    def state(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


def controlled(decider: Decider, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    model = build("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    judge = [batch(number=900)]
    given = {"loss": sample_loss, "optimizer": optimizer, "total_steps": 100, "judge": judge, "lifecycle": short()} | settings
    return attach(model, sites=["fc1"], controller=decider, **given), optimizer


def run(grow: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        loss = sample_loss(grow.registry.model, batch(number=number)).mean()
        loss.backward()
        grow.after_backward(batch(number=number), loss.detach())
        optimizer.step()
        grow.tick(loss.detach())
        optimizer.zero_grad()


def test_a_controller_that_raises_loses_that_decision_and_is_dismissed_when_it_repeats_it(caplog: pytest.LogCaptureFixture):
    decider = Decider(range(1, 3))
    grow, optimizer = controlled(decider)
    run(grow, optimizer, 8)
    assert grow.transitions.counts["germinated"] == 1, "two exceptions cost two decisions, no more"
    assert len([record for record in caplog.records if record.exc_info]) == 1
    again = Decider(range(1, 100))
    grow, optimizer = controlled(again)
    run(grow, optimizer, 8)
    assert again.asked == REPEATED and grow.transitions.counts["germinated"] == 0
    state = json.loads(json.dumps(grow.port.runner.state()))
    fresh = Contained(Decider(range(0)))
    fresh.load_state(state)
    assert fresh.dismissed and fresh.own.asked == REPEATED, "a run that goes on does not ask it again"


def test_debugging_raises_what_a_controller_raises():
    grow, optimizer = controlled(Decider(range(1, 3)), debug=True)
    with pytest.raises(ZeroDivisionError):
        run(grow, optimizer, 3)
