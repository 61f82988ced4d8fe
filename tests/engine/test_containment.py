"""A branch that computes NaN or infinity is left out of forward and backward, is counted, and goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, batch, germinate, same, sample_loss, short

from esper.blueprints import GLU, MLP, Affine, Blueprint, Conv, LowRank
from esper.engine.extra_passes import host_parameters
from esper.engine.measurements import Measured
from esper.lifecycle import Stage
from esper.seeds import Branch

S = Stage
BLENDED = (S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED)
PATIENT = {"evaluating_min": "20step", "stabilization_min": "20step", "fine_tuning_min": "20step", "fade": "20step"}


def poison(loop: Loop, branch: Branch, kind: str) -> None:
    bank: Any = loop.grow.registry.layers[branch.site].bank(branch.blueprint)
    rows = (
        [p.data for p in bank.blocks[str(branch.slot)].parameters()]
        if branch.blueprint == "block"
        else [p.data[branch.slot] for p in bank.stacks.values()]
    )
    for number, row in enumerate(rows):
        if kind == "nan":
            row.fill_(float("nan"))
        elif kind == "inf" and number == len(rows) - 1:
            row.fill_(float("inf"))
        elif kind == "overflow":  # every parameter is finite, what they compute is not
            row.fill_(3e38)


def brought_to(stage: Stage, host: str = "mlp", **settings: Any) -> tuple[Loop, Branch]:
    """A loop whose first branch is in ``stage``, with a second one beside it at the same site."""
    lifecycle = short(**PATIENT) if stage is not S.FOSSILIZED else short()
    loop = Loop(host, settings={"lifecycle": lifecycle} | settings)
    site = loop.grow.registry.sites[0]
    loop.port.script = {1: [germinate(site.name, seed) for seed in range(min(2, site.geometry.seeds))]}
    branch = loop.until(S.EVALUATING if stage is S.CULLED else stage, most=150)
    if stage is S.CULLED:
        loop.grow.transitions.move(branch.row, S.CULLED, "as a gate would")
        loop.grow.registry.refresh()
    loop.step()
    return loop, branch


def passed(loop: Loop) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parameters = host_parameters(loop.model)
    torch.manual_seed(5)
    losses = sample_loss(loop.model, batch(loop.host, 77))
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()))
    return losses.detach(), dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("kind", ["nan", "inf", "overflow"])
@pytest.mark.parametrize("stage", [*BLENDED, S.CULLED])
def test_outputs_and_gradients_are_those_without_the_branch(stage: Stage, kind: str):
    loop, branch = brought_to(stage)
    before = passed(loop)
    poison(loop, branch, kind)
    outputs, gradients = passed(loop)
    with loop.grow.registry.without(branch):
        expected, expected_gradients = passed(loop)
    assert torch.equal(outputs, expected) and bool(torch.isfinite(outputs).all())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])
    assert not torch.equal(before[0], outputs), "before, the branch did add something"


@pytest.mark.parametrize(
    "blueprint",
    [Affine(), Affine(receptive_field="layer"), LowRank(), MLP(receptive_field="chunk"), GLU(), Conv(), Conv(receptive_field="chunk")],
    ids=lambda b: f"{b.name}-{b.receptive_field}",
)
@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_whatever_the_blueprint(blueprint: Blueprint, kind: str):
    loop, branch = brought_to(S.STABILIZATION, "cnn_group", blueprint=blueprint)
    poison(loop, branch, kind)
    outputs, gradients = passed(loop)
    with loop.grow.registry.without(branch):
        expected, expected_gradients = passed(loop)
    assert torch.equal(outputs, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("host", ["cnn_batch", "transformer"])
def test_a_block_too(host: str):
    loop, branch = brought_to(S.STABILIZATION, host, blueprint="block")
    poison(loop, branch, "nan")
    loop.model.eval()
    outputs, gradients = passed(loop)
    with loop.grow.registry.without(branch):
        expected, expected_gradients = passed(loop)
    torch.testing.assert_close(outputs, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("stage", [S.TRAINING, *BLENDED])
def test_it_is_counted_and_goes_at_the_next_tick_without_a_fade(stage: Stage):
    settings = {"lifecycle": short(readiness=1.0)} if stage is S.TRAINING else {}
    loop, branch = brought_to(stage, **settings)
    slot, row = branch.slot, branch.row
    poison(loop, branch, "nan")
    loop.step()
    table, bank = loop.grow.registry.table, loop.grow.registry.layers[0].bank("mlp")
    if stage is S.FOSSILIZED:
        assert branch.stage is S.FOSSILIZED and branch.alive
        assert [said.code for said in loop.port.alerts] == ["fossil_not_finite"]
    else:
        assert branch.stage is (S.ROLLED_BACK if stage is S.STABILIZATION else S.CULLED)
        assert int(table.errors[row]) == 1 and not branch.alive
        assert float(loop.grow.registry.branches.alpha[branch.id]) == 0.0
        assert "not finite" in loop.port.transitions[-1].cause
        assert not any(stack[slot].any() for stack in bank.stacks.values())
    loop.run(3)
    assert all(bool(torch.isfinite(value).all()) for value in loop.host_state().values())
    other = loop.grow.registry.branches[1]
    assert other.alive and other.stage is not S.CULLED, "its neighbour in the same bank lives on"


@pytest.mark.parametrize("objective", ["shadow", "functional_gradient", "reconstruction"])
def test_one_that_fails_while_learning_spoils_neither_host_nor_neighbour(objective: str):
    lifecycle = short(objective=objective, readiness=1.0, training_max="200step")
    both = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=0), germinate(seed=1)]}).run(3)
    alone = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=1)]}).run(3)
    poison(both, both.grow.registry.branches[0], "nan")
    for loop in (both, alone):
        loop.run(4)
    assert both.grow.registry.branches[0].stage is S.CULLED
    same(both.host_state(), alone.host_state())
    mine, other = both.grow.registry.branches[1], alone.grow.registry.branches[0]
    banks = [loop.grow.registry.layers[0].bank("mlp") for loop in (both, alone)]
    assert mine.stage is S.TRAINING and int(banks[0].steps[mine.slot]) == int(banks[1].steps[other.slot])
    if objective != "reconstruction":
        return  # what the neighbour learnt before the poisoning depends on the other branch
    for name in banks[0].stacks:
        torch.testing.assert_close(banks[0].stacks[name][mine.slot], banks[1].stacks[name][other.slot], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_overflows_behind_a_finite_output_is_contained():
    loop, branch = brought_to(S.FINE_TUNING, blueprint=Affine(receptive_field="layer"))
    bank: Any = loop.grow.registry.layers[0].bank("affine")
    with torch.no_grad():
        bank.stacks["scale"][branch.slot].fill_(1e38)
        loop.model.fc1.weight.zero_()
        loop.model.fc1.bias.zero_()
    outputs, gradients = passed(loop)
    assert bool(torch.isfinite(outputs).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step later"])
@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING, S.FINE_TUNING], ids=lambda stage: stage.name)
def test_a_batch_that_is_not_finite_is_held_against_no_branch(stage: Stage, late: bool):
    loop = Loop(settings={"lifecycle": short(**PATIENT, readiness=1.0 if stage is S.TRAINING else -1.0)}, commands={1: [germinate()]})
    loop.grow.readings.late = late
    branch = loop.until(stage, most=150)
    path, (inputs, targets) = list(branch.path), loop.batch(500)
    loop.backward((inputs * float("nan"), targets))
    loop.optimizer.zero_grad()  # the loop leaves the step out, and the tick too late to be asked for
    with pytest.warns(UserWarning, match="the training loss is not finite"):
        loop.grow.tick(float("nan"))
        loop.run(2)
    bank: Any = loop.grow.registry.layers[0].bank("mlp")
    assert branch.path == path and branch.stage is stage and not loop.grow.branch_optimizer.failures
    assert all(bool(torch.isfinite(stack).all()) for stack in bank.stacks.values())


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read a step later"])
def test_nor_is_a_micro_batch_whose_step_has_a_finite_metric(late: bool):
    lifecycle = short(**PATIENT, readiness=1.0)
    loop = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate()]}, accumulate=2)
    loop.grow.readings.late = late
    branch = loop.until(S.TRAINING)
    inputs, targets = loop.batch(500)
    bank: Any = loop.grow.registry.layers[0].bank("mlp")
    before = bank.stacks["w2"].detach().clone()
    loop.backward((inputs, targets))
    loop.backward((inputs * float("nan"), targets))
    loop.optimizer.zero_grad()
    loop.grow.tick(1.0)
    assert not torch.equal(bank.stacks["w2"], before) and bool(torch.isfinite(bank.stacks["w2"]).all()), "it learns from the other"
    for number in range(2):
        loop.step(loop.batch(number), loop.batch(number + 10))
    assert branch.stage is S.TRAINING and branch.alive


def test_rarely_failing_is_borne_and_a_failing_strategy_is_not():
    loop, branch = brought_to(S.GRAFTING)
    loop.grow.boundary.judge(loop.grow.tick_number, Measured(error_rates={branch.id: 0.4}))
    assert branch.stage is S.GRAFTING
    gave_up = Measured(trouble={branch.id: "grafting strategy linear gave up: a signal is not finite"})
    loop.grow.boundary.judge(loop.grow.tick_number, gave_up)
    assert branch.stage is S.CULLED and "gave up" in loop.port.transitions[-1].cause


def test_a_fossil_is_told_of_once_and_again_when_it_fails_anew():
    loop, branch = brought_to(S.FOSSILIZED)
    bank = loop.grow.registry.layers[0].bank("mlp")
    sound = {name: stack.detach()[branch.slot].clone() for name, stack in bank.stacks.items()}

    def said() -> list[int]:
        return [alert.tick for alert in loop.port.alerts if alert.code == "fossil_not_finite"]

    poison(loop, branch, "nan")
    loop.run(6)
    first = loop.grow.tick_number - 5
    assert said() == [first], "six ticks, one alert"
    with torch.no_grad():
        for name, stack in bank.stacks.items():
            stack[branch.slot] = sound[name]
    loop.run(3)
    poison(loop, branch, "inf")
    loop.run(4)
    assert said() == [first, first + 9]
    assert branch.stage is S.FOSSILIZED and branch.alive
