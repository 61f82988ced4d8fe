"""What each stage does to the branch's parameters, to its share in the forward pass, and to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, batch, build, germinate, same, sample_loss, set_stage, short

from esper import attach
from esper.controllers import CONFIGS as CONTROLLERS
from esper.grafting import CONFIGS
from esper.lifecycle import Stage
from esper.messages import EmergencyStop, Transition
from esper.seeds import Branch, TelemetryConfig

S = Stage
SLOW = short(training_min="6step", stabilization_min="6step", evaluating_min="6step", fine_tuning_min="6step", fade="6step")


def values(loop: Loop, branch: Branch) -> list[torch.Tensor]:
    bank: Any = loop.grow.registry.layers[branch.site].bank(branch.blueprint)
    rows = [stack.detach()[branch.slot] for stack in bank.stacks.values()]
    return [row.clone() for row in (*rows, bank.steps[branch.slot])]


@pytest.mark.parametrize("stage", [S.STABILIZATION, S.EVALUATING, S.FOSSILIZED])
def test_a_frozen_branch_does_not_move_at_all(stage: Stage):
    loop = Loop(settings={"lifecycle": SLOW}, commands={1: [germinate()]})
    branch = loop.until(stage)
    before = values(loop, branch)
    loop.run(4)
    assert branch.stage is stage
    assert all(torch.equal(old, new) for old, new in zip(before, values(loop, branch), strict=True))


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.FINE_TUNING])
def test_a_learning_branch_moves(stage: Stage):
    loop = Loop(settings={"lifecycle": SLOW}, commands={1: [germinate()]})
    branch = loop.until(stage)
    loop.run(1)
    before = values(loop, branch)
    loop.run(1)
    assert branch.stage is stage and any(not torch.equal(a, b) for a, b in zip(before, values(loop, branch), strict=True))


def test_a_fossil_keeps_contributing_and_outlives_a_new_generation_on_its_chunk():
    loop = Loop(settings={"lifecycle": short(reseed=True)}, commands={1: [germinate()]})
    fossil = loop.until(S.FOSSILIZED)
    kept = values(loop, fossil)
    loop.run(30)
    registry = loop.grow.registry
    loop.port.script[loop.grow.tick_number + 1] = [germinate(id="again")]
    loop.run(12)
    assert loop.port.acks["again"] == ("applied", "")
    assert ("FOSSILIZED", "GERMINATED") in loop.port.stages()
    second = registry.branches[1]
    assert second.row == fossil.row and second.generation == 2 and second.stage is S.GRAFTING
    assert float(registry.branches.alpha[fossil.id]) == 1.0 and fossil.alive
    assert all(torch.equal(a, b) for a, b in zip(kept, values(loop, fossil), strict=True))
    with torch.no_grad():
        on = sample_loss(loop.model, batch())
        with registry.without(fossil):
            off = sample_loss(loop.model, batch())
    assert not torch.equal(on, off)


def test_a_culled_branch_fades_out_then_frees_its_slot_and_rests():
    loop = Loop(settings={"lifecycle": short(gain=1e3, fade="4step", embargo="3step", evaluating_max="3step")}, commands={1: [germinate()]})
    branch = loop.until(S.CULLED)
    registry, bank = loop.grow.registry, loop.grow.registry.layers[0].bank("mlp")
    row, before = branch.row, values(loop, branch)
    alphas = [float(registry.branches.alpha[branch.id])]
    while branch.stage is S.CULLED:
        alive = branch.alive
        loop.run(1)
        if branch.alive:
            assert all(torch.equal(a, b) for a, b in zip(before, values(loop, branch), strict=True)), "it does not learn any more"
        elif alive:
            assert bank.used == [False] and not any(stack.any() for stack in bank.stacks.values())
        alphas.append(float(registry.branches.alpha[branch.id]))
    assert alphas == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert registry.table.stage_of(row) is S.DORMANT and int(registry.table.branch[row]) == -1
    assert loop.grow.executor.apply(germinate(id="again"), loop.grow.tick_number)[0] == "applied"
    assert registry.branches[1].slot == branch.slot and registry.branches[1].generation == 2


def test_alpha_climbs_tick_by_tick_to_its_end():
    loop = Loop(commands={1: [germinate()]})
    branch = loop.until(S.GRAFTING)
    alphas = []
    while branch.stage is S.GRAFTING:
        alphas.append(float(loop.grow.registry.branches.alpha[branch.id]))
        loop.run(1)
    assert alphas == pytest.approx([tick / 20 for tick in range(20)])
    (group,) = loop.grow.registry.layers[0].groups
    assert group.alpha.tolist() == [1.0], "what the forward reads"


@pytest.mark.parametrize("highest", [0.7, 0.1, 0.9999])
def test_an_alpha_that_is_no_binary_fraction_is_reached_too(highest: float):
    loop = Loop(settings={"grafting": CONFIGS["linear"](alpha_max=highest)}, commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    assert float(loop.grow.registry.branches.alpha[branch.id]) == pytest.approx(highest)


@pytest.mark.parametrize("strategy", ["linear", "drift", "momentum", "adaptive", "stability", "grad_norm", "performance"])
def test_every_strategy_brings_a_branch_in(strategy: str):
    lifecycle = short(grafting_max="90step")
    loop = Loop(settings={"lifecycle": lifecycle, "grafting": strategy}, commands={1: [germinate()]})
    loop.until(S.STABILIZATION, most=120)
    assert (loop.grow.meter.spent.get("objective", 0) > 0) == (strategy in ("adaptive", "performance"))


def test_a_germinated_seed_waits_for_a_slot_and_goes_when_it_waits_too_long():
    lifecycle = short(training_slots=1, germinated_max="4step", readiness=1.0, training_max="40step")
    loop = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=0)], 2: [germinate(seed=1)]}).run(3)
    assert [b.stage for b in loop.grow.registry.branches.entries] == [S.TRAINING, S.GERMINATED]
    loop.run(4)
    assert loop.port.stages()[-2:] == [("GERMINATED", "CANCELLED"), ("CANCELLED", "DORMANT")]
    assert loop.port.transitions[-2].cause == "GERMINATED reached its maximum age"


def test_without_a_judge_no_branch_is_kept_and_the_host_is_not_rolled_back():
    loop = Loop(settings={"judge": None, "sample": batch()}, commands={1: [germinate()]})
    loop.until(S.CULLED)
    assert loop.port.stages()[-1] == ("EVALUATING", "CULLED")
    assert loop.grow.transitions.counts == {"germinated": 1, "fossilized": 0, "culled": 1, "cancelled": 0, "rolled_back": 0}


def test_a_branch_that_changes_nothing_is_not_kept():
    loop = Loop(commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    bank: Any = loop.grow.registry.layers[0].bank("mlp")
    with torch.no_grad():
        for stack in bank.stacks.values():
            stack[branch.slot] = 0.0
    loop.run(25)
    assert branch.bound == 0.0 and ("EVALUATING", "CULLED") in loop.port.stages()


def test_a_transition_says_what_where_and_why():
    loop = Loop(commands={1: [germinate("fc2", 1)]}).run(6)
    first, second, third = loop.port.transitions[:3]
    same = {"site": "fc2", "seed": 1, "branch": 0, "generation": 1, "blueprint": "mlp", "strategy": "linear", "objective": "shadow"}
    assert first == Transition(tick=1, source=0, target=1, cause="command germinate-fc2-1", **same)
    assert second == Transition(tick=2, source=1, target=2, cause="a training slot is free", **same)
    assert third == Transition(tick=4, source=2, target=3, cause="gate passed", **same)


def test_minimum_ages_hold_for_stages_entered_by_command():
    loop = Loop(settings={"lifecycle": short(fine_tuning_min="5step", evaluating_min="3step")}, commands={1: [germinate()]})
    branch = loop.until(S.FOSSILIZED)
    path = dict(branch.path)
    assert path["TRAINING"] - path["GERMINATED"] >= 1
    assert path["GRAFTING"] - path["TRAINING"] >= 2
    assert path["STABILIZATION"] - path["GRAFTING"] == 20
    assert path["FINE_TUNING"] - path["EVALUATING"] >= 3
    assert path["FOSSILIZED"] - path["FINE_TUNING"] >= 5


@pytest.mark.parametrize("command", [set_stage(S.ROLLED_BACK), EmergencyStop(id="ROLLED_BACK-fc1-0")])
def test_a_host_that_is_worse_without_the_branch_that_a_command_takes_returns(command: Any):
    lifecycle = short(judge_every="90step")  # one state is kept: the beginning's
    loop = Loop(settings={"lifecycle": lifecycle}, commands={30: [germinate()]})
    loop.until(S.GRAFTING)
    kept = loop.host_state()
    loop.run(5)
    with torch.no_grad():
        loop.model.head.weight.neg_()
    loop.port.script[loop.grow.tick_number + 1] = [command]
    loop.run(1)
    assert loop.port.acks["ROLLED_BACK-fc1-0"] == ("applied", "")
    now = loop.host_state()
    assert all(torch.equal(kept[name], now[name]) for name in kept)
    assert [said.code for said in loop.port.alerts] == ["host_returned"]


def test_a_host_that_has_learned_since_is_not_taken_back_by_a_command():
    loop = Loop(commands={1: [germinate()]})
    loop.until(S.GRAFTING)
    loop.run(5)
    loop.port.script[loop.grow.tick_number + 1] = [set_stage(S.ROLLED_BACK)]
    loop.backward()
    loop.optimizer.step()
    now = loop.host_state()
    loop.grow.tick(1.0)
    same(now, loop.host_state())
    assert loop.port.stages()[-1] == ("GRAFTING", "ROLLED_BACK") and not loop.port.alerts


SCRIPT = [{"at": f"{at}step", "command": "germinate", "site": "fc1", "count": 1} for at in (12, 60)]
AGAIN = {
    "heuristic": {"germinate_at": "12step", "plateau": "20step", "until": "90step", "count": 1},
    "random": {"earliest": "12step", "latest": "60step", "count": 2},
    "scheduled": {"script": SCRIPT},
}


@pytest.mark.parametrize("reseed", [True, False])
@pytest.mark.parametrize("name", list(AGAIN))
def test_a_controller_takes_a_fossilized_seed_for_a_free_place_where_it_may_germinate_again(name: str, reseed: bool):
    """One site with one seed: there is no other place."""
    controller = CONTROLLERS[name](**AGAIN[name])
    told = {"sites": "fc1", "per_site": 1, "judge": [batch(number=900, size=64)], "telemetry": TelemetryConfig(every=1)}
    grow = attach(build("mlp"), loss=sample_loss, total_steps=100, lifecycle=short(reseed=reseed, gain=0.0), controller=controller, **told)
    for number in range(100):
        data = batch(number=number)
        loss = sample_loss(grow.registry.model, data).mean()
        loss.backward()
        grow.after_backward(data, loss.detach())
        grow.tick(loss.detach())
        grow.observe({"validation/loss": 1.0})
    entries = grow.registry.branches.entries
    assert entries[0].stage is S.FOSSILIZED and entries[0].alive
    assert [branch.generation for branch in entries][:2] == ([1, 2] if reseed else [1])
