"""Slow harm: a branch that raises the loss step by step goes and the host returns; whoever does no harm is left alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from growing import Loop, batch, build, germinate, same, sample_loss, short
from hostile import HostileMLP, ReversedGradient
from torch import Tensor

from esper.blueprints.base import Parameters
from esper.blueprints.mlp import MLP
from esper.engine.attach import attach
from esper.engine.judging.guard import worse
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.grafting import CONFIGS
from esper.lifecycle import Stage

S = Stage


class Mixed(MLP):
    """The first branch of a bank works for the host, the second against it."""

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        turned = {name: torch.cat([value[:1], ReversedGradient.apply(value[1:])]) for name, value in parameters.items()}
        return super().forward(turned, x)


LONG = CONFIGS["linear"](ramp="60step")


def watched(blueprint: Any = "mlp", seeds: tuple[int, ...] = (0,), **changes: Any) -> Loop:
    """A loop whose branches are blended in for sixty steps, learn fast, and are looked at every third tick."""
    settings = {"grafting": LONG, "blueprint": blueprint, "learning": BranchLearning(lr=0.05), "judge": [batch(number=900, size=256)]}
    lifecycle = short(**({"grafting_max": "90step", "readiness": -1e9} | changes))
    loop = Loop(settings=settings | {"lifecycle": lifecycle}, total=400)
    loop.run(20)  # a host that has learnt something
    loop.port.script = {21: [germinate(seed=seed) for seed in seeds]}
    return loop


def causes(loop: Loop) -> list[str]:
    return [said.cause for said in loop.port.transitions if said.cause.startswith("slow harm")]


def judged(loop: Loop) -> float:
    loop.grow.registry.refresh()
    with torch.no_grad():
        return float(sample_loss(loop.model, batch(number=900, size=256)).mean())


def test_a_branch_that_raises_the_loss_is_removed_and_the_host_is_no_worse():
    loop = watched(HostileMLP(kind="adversarial"))
    branch = loop.until(S.GRAFTING)
    before = judged(loop)
    loop.until(S.ROLLED_BACK, most=60)
    assert not branch.alive and len(causes(loop)) == 1
    assert judged(loop) <= before + 0.02
    assert not loop.grow.guard.baselines and loop.grow.guard.calm is None, "what was kept is let go"


def test_a_control_that_is_never_judged_may_switch_the_guard_off():
    loop = watched(HostileMLP(kind="adversarial"), guard=False)
    branch = loop.until(S.GRAFTING)
    loop.run(50)
    assert not causes(loop) and branch.stage is S.GRAFTING


def test_the_host_returns_with_its_optimizer_to_a_state_that_was_kept(monkeypatch: pytest.MonkeyPatch):
    loop = watched()
    loop.until(S.GRAFTING)
    guard, kept = loop.grow.guard, {}
    keep = guard._keep

    def remembering(tick: int) -> Any:
        kept[tick] = loop.host_state(), loop.optimizer.state_dict()["state"][0]["exp_avg"].clone(), loop.grow.signal.fast
        return keep(tick)

    monkeypatch.setattr(guard, "_keep", remembering)
    kept[guard.baselines[0].tick] = loop.host_state(), loop.optimizer.state_dict()["state"][0]["exp_avg"].clone(), loop.grow.signal.fast
    told: list[int] = []
    guard.on_return = lambda: told.append(loop.grow.tick_number)
    loop.run(8)
    with torch.no_grad():
        loop.model.head.weight.neg_()
    loop.until(S.ROLLED_BACK, most=9)
    assert len(told) == 1, "whoever measures what is usual is told"
    (alert,) = loop.port.alerts
    assert alert.code == "host_returned" and alert.tick == loop.grow.tick_number
    state, moments, fast = kept[int(alert.text.rsplit(" ", 1)[1])]
    same(state, loop.host_state())
    assert torch.equal(moments, loop.optimizer.state_dict()["state"][0]["exp_avg"]) and fast == loop.grow.signal.fast


def test_of_two_branches_the_one_that_harms_goes_and_the_other_stays():
    loop = watched(Mixed(), seeds=(0, 1), grafting_max="65step")
    loop.run(50)
    good, bad = loop.grow.registry.branches.entries
    assert bad.stage in (S.ROLLED_BACK, S.DORMANT) or not bad.alive
    assert good.alive and len(causes(loop)) == 1


def test_a_healthy_branch_becomes_a_fossil_and_not_a_bit_differs_without_the_guard(monkeypatch: pytest.MonkeyPatch):
    loop = watched(grafting_max="65step")
    branch = loop.until(S.FOSSILIZED, most=130)
    assert [said.gate for said in loop.port.gates if said.passed][-2:] == ["final_gain", "no_harm"] and not loop.port.alerts
    alone = watched(grafting_max="65step")
    for name in ("watch", "settle"):
        monkeypatch.setattr(alone.grow.guard, name, lambda tick: None)
    alone.until(S.FOSSILIZED, most=130)
    same(loop.host_state(), alone.host_state())
    assert branch.path == alone.grow.registry.branches[0].path


def test_a_host_that_leans_on_a_branch_is_no_proof_of_its_worth(monkeypatch: pytest.MonkeyPatch):
    """The gain is what the host loses without the branch: a host that was ruined around it loses much."""
    loop = watched(grafting_max="65step")
    branch = loop.until(S.FINE_TUNING, most=130)
    monkeypatch.setattr(loop.grow.guard, "watch", lambda tick: None)
    for sound in loop.grow.guard.baselines.values():
        sound.began -= 10.0
        sound.fast -= 10.0
    loop.until(S.CULLED, most=30)
    asked = [said for said in loop.port.gates if said.gate == "no_harm"]
    assert asked and not any(said.passed for said in asked) and branch.gain > 0.0


def test_a_host_that_learns_its_data_by_heart_is_not_blamed_on_a_branch():
    """The judge set's loss rises under it, with branches and without."""
    loop = watched(grafting_max="65step")
    branch = loop.until(S.FINE_TUNING, most=130)
    for sound in loop.grow.guard.baselines.values():
        sound.began -= 10.0
        sound.losses = sound.losses - 10.0
    loop.until(S.FOSSILIZED, most=30)
    assert branch.alive and not causes(loop) and not loop.port.alerts
    assert [said.passed for said in loop.port.gates if said.gate == "no_harm"][-1]


def test_a_training_loss_that_falls_asks_the_judge_nothing(monkeypatch: pytest.MonkeyPatch):
    loop = watched()
    loop.until(S.GRAFTING)
    asked: list[int] = []
    losses = loop.grow.judge.losses
    monkeypatch.setattr(loop.grow.judge, "losses", lambda without: (asked.append(loop.grow.tick_number), losses(without))[1])
    for _ in range(12):
        loop.backward()
        loop.optimizer.step()
        loop.grow.tick(1.0 / loop.grow.tick_number)
        loop.optimizer.zero_grad()
    assert asked == []
    loop.grow.tick(5.0)
    loop.grow.tick(5.0)
    loop.grow.tick(5.0)
    assert len(asked) == 1 and asked[0] % 3 == 0, "every third tick, once it has risen"


@pytest.mark.parametrize("now", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [5.0, 5.1]])
def test_missing_and_non_finite_losses_are_worse_and_so_are_higher_ones(now: list[float]):
    assert worse(torch.tensor(now).double(), torch.tensor([1.0, 1.0]).double(), 0.05)


@pytest.mark.parametrize("now", [[1.0, 1.0], [0.5, 1.4], [-1.0, 3.5]])
def test_what_is_not_higher_with_confidence_is_not_worse(now: list[float]):
    assert not worse(torch.tensor(now).double(), torch.tensor([1.0, 1.0]).double(), 0.05)


def test_the_guard_goes_on_from_a_saved_state_with_the_same_bits():
    loop = watched(HostileMLP(kind="adversarial"))
    loop.until(S.GRAFTING)
    loop.run(4)
    while loop.grow.guard.calm is None:
        loop.run(1)
    saved, host = loop.grow.state(), loop.host_state()
    optimizer = copy.deepcopy(loop.optimizer.state_dict())
    model = build("mlp")
    model.load_state_dict(host)
    again = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    again.load_state_dict(optimizer)
    other = Loop(seeds=False)
    other.model, other.optimizer, other.step_number = model, again, loop.step_number
    settings = loop.settings | {"per_site": 2, "total_steps": 400, "loss": sample_loss, "optimizer": again, "port": other.port}
    other._grow = attach(model, state=saved, telemetry=loop.grow.settings.telemetry, **settings)
    held = other.grow.guard
    assert held.baselines.keys() == {0} and held.calm is not None and held.lowest == loop.grow.guard.lowest
    assert torch.equal(held.baselines[0].losses, loop.grow.guard.baselines[0].losses)
    for one in (loop, other):
        one.until(S.ROLLED_BACK, most=60)
    assert [said.text for said in other.port.alerts] == [said.text for said in loop.port.alerts]
    same(loop.host_state(), other.host_state())


def diverged(loop: Loop, steps: int) -> None:
    """Steps of a loop whose loss is NaN, as after too high a learning rate."""
    for _ in range(steps):
        loop.step((torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.filterwarnings("ignore:esper. the training loss")
@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING])
def test_a_loss_that_is_not_finite_is_said_once_and_nothing_grows_meanwhile(stage: Stage):
    lifecycle = short(training_min="4step", stabilization_min="6step", evaluating_min="6step", guard=False)
    loop = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=0)]})
    branch = loop.until(stage)
    loop.step()
    alpha, stages = float(loop.grow.registry.branches.alpha[branch.id]), list(branch.path)
    values = loop.grow.registry.layers[0].bank("mlp").values(branch.slot)
    host = loop.host_state()
    loop.port.script = {loop.grow.tick_number + 2: [germinate(seed=1, id="meanwhile")]}
    with pytest.warns(UserWarning, match="the training loss is not finite"):
        diverged(loop, 1)
    diverged(loop, 8)
    assert [said.code for said in loop.port.alerts] == ["loss_not_finite"]
    assert loop.port.acks["meanwhile"] == ("refused", "the training loss is not finite, so nothing germinates until it is again")
    assert branch.path == stages and float(loop.grow.registry.branches.alpha[branch.id]) == alpha
    same(values, loop.grow.registry.layers[0].bank("mlp").values(branch.slot))
    with torch.no_grad():  # the user puts an earlier state back
        for name, value in loop.model.state_dict().items():
            if name in host:
                value.copy_(host[name])
    loop.optimizer.state.clear()
    loop.run(30)
    assert branch.path != stages, "with the loss back, life goes on"


@pytest.mark.filterwarnings("ignore:esper. the training loss")
def test_a_seed_that_waits_does_not_begin_to_learn_on_a_host_that_diverged():
    loop = Loop(commands={1: [germinate()]}).run(1)
    branch = loop.grow.registry.branches[0]
    assert branch.stage is S.GERMINATED
    diverged(loop, 4)
    assert branch.stage is S.GERMINATED


@pytest.mark.filterwarnings("ignore:esper. the training loss")
def test_a_run_that_goes_on_from_a_diverged_state_grows_nothing_either():
    loop = Loop(commands={1: [germinate()]})
    loop.run(2)
    diverged(loop, 2)
    state = loop.grow.state()
    again = Loop(settings={"state": state}, commands={5: [germinate(seed=1, id="later")]})
    again.grow.tick(None)
    assert again.port.acks["later"][0] == "refused" and not again.port.alerts, "it has been said already"
