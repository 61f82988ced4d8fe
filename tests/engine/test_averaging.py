"""Averages of the weights follow what grows: torch's AveragedModel in a loop of one's own, and ``trainer.ema``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, batch, germinate, same, sample_loss, short
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.engine.extra_passes import host_buffers, host_parameters
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.seeds.layer import ATTRIBUTE

S = Stage
SCRIPT = {1: [germinate("fc1", 0), germinate("fc2", 1)], 3: [germinate("fc1", 1)]}


def averaged_loop(when: str, host: str = "mlp", decay: float = 0.8, **settings: Any) -> tuple[Loop, AveragedModel]:
    """A loop with an average made before or after attaching, an equal one where ``decay`` is 0."""
    rule = {"multi_avg_fn": get_ema_multi_avg_fn(decay)} if decay else {}
    loop = Loop(host, commands=settings.pop("commands", SCRIPT), settings=settings)
    before = Loop(host, seeds=False).model
    average = AveragedModel(before if when == "before" else loop.model, use_buffers=True, **rule)
    loop.grow.follow(average)
    return loop, average


def run(loop: Loop, average: AveragedModel, steps: int) -> None:
    for _ in range(steps):
        loop.step()
        average.update_parameters(loop.model)


@pytest.mark.parametrize("host", ["mlp", "batch_norm"])
@pytest.mark.parametrize("decay", [0.8, 0.0])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_hosts_average_is_the_one_it_would_be_and_has_what_grew(when: str, decay: float, host: str):
    loop, average = averaged_loop(when, host, decay, lifecycle=short(evaluating_min="60step", evaluating_max="90step"))
    expected: dict[str, torch.Tensor] = {}
    seen: list[dict[str, torch.Tensor]] = []
    for _ in range(60):
        run(loop, average, 1)
        seen.append({name: value.detach().clone() for name, value in host_parameters(loop.model).items()})
    for name in seen[0]:
        value = seen[0][name]
        for count, later in enumerate(seen[1:], 1):
            value = decay * value + (1 - decay) * later[name] if decay else value + (later[name] - value) / (count + 1)
        expected[name] = value
    for name, value in host_parameters(average.module).items():
        torch.testing.assert_close(value, expected[name], msg=name)
    blended = loop.grow.registry.blended(0)
    assert blended, "something has grown"
    x = batch(host, 77)[0]
    average.eval()
    with torch.no_grad():
        whole = average(x)
        average.module.fc1._modules[ATTRIBUTE].groups = []
        assert not torch.equal(whole, average(x)), "the average computes with what grew"


def test_a_branch_is_averaged_from_its_fine_tuning_on_and_as_it_is_before():
    lifecycle = short(fine_tuning_min="15step", fine_tuning_max="40step")
    loop, average = averaged_loop("before", commands={1: [germinate()]}, lifecycle=lifecycle)
    branch = loop.until(S.GRAFTING)

    def rows(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        bank = model.fc1._modules[ATTRIBUTE].bank("mlp")
        return {name: stack.detach()[branch.slot].clone() for name, stack in bank.stacks.items()}

    while branch.stage is not S.FINE_TUNING:
        run(loop, average, 1)
        if branch.stage is not S.FINE_TUNING:
            for name, value in rows(loop.model).items():
                torch.testing.assert_close(value, rows(average.module)[name], rtol=1e-5, atol=1e-7)
    start = rows(average.module)
    run(loop, average, 8)
    differs = [name for name, value in rows(loop.model).items() if not torch.allclose(value, rows(average.module)[name], atol=1e-6)]
    assert differs and any(not torch.equal(start[name], rows(average.module)[name]) for name in differs)


def test_the_averages_forward_is_that_of_its_values_and_exporting_gives_it():
    loop, average = averaged_loop("after")
    run(loop, average, 50)
    x = batch(number=5)[0]
    loop.model.eval(), average.eval()
    before = loop.host_state()
    with torch.no_grad(), loop.grow.followers[0].applied():
        expected = loop.model(x)
    same(before, loop.host_state())
    with torch.no_grad():
        torch.testing.assert_close(average(x), expected)
    loop.grow._kept = loop.grow.followers[0]
    with torch.no_grad():
        torch.testing.assert_close(loop.grow.export().eval()(x), expected, rtol=1e-4, atol=1e-6)
    same(before, loop.host_state())


def test_slots_that_are_freed_and_taken_again_begin_anew_in_the_average():
    script = {number: [germinate(seed=number % 3 % 2, id=f"again-{number}")] for number in range(1, 60)}
    loop, average = averaged_loop("before", commands=script, lifecycle=short(readiness=1.0, training_max="6step"))
    reused = 0
    for _ in range(50):
        run(loop, average, 1)
        banks = [model.fc1._modules[ATTRIBUTE].banks for model in (loop.model, average.module)]
        for branch in loop.grow.registry.branches.living():
            reused += branch.id > 1
            for name, stack in banks[0]["mlp"].stacks.items():
                torch.testing.assert_close(banks[1]["mlp"].stacks[name][branch.slot], stack[branch.slot], msg=f"{branch.id} {name}")
    assert reused > 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loop_that_goes_on_averages_with_the_same_bits(when: str, tmp_path: Path):
    lifecycle = short(fine_tuning_min="15step", fine_tuning_max="40step")
    loop, average = averaged_loop(when, lifecycle=lifecycle)
    while not loop.grow.registry.in_stage(S.FINE_TUNING):
        run(loop, average, 1)
    run(loop, average, 4)
    saved = copy.deepcopy((loop.grow.host_state(), loop.optimizer.state_dict(), average.state_dict()))
    assert not any(ATTRIBUTE in name for name in saved[2]), "the average's own state fits a fresh copy"
    loop.grow.save_branches(tmp_path)
    drawn = torch.get_rng_state()
    again = Loop(seeds=False)
    again.model.load_state_dict(saved[0])
    resumed = AveragedModel(again.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    resumed.load_state_dict(saved[2])
    fresh = Loop(settings={"lifecycle": lifecycle, "state": tmp_path}, commands=SCRIPT)
    fresh.model.load_state_dict(saved[0], strict=False)
    fresh.optimizer.load_state_dict(saved[1])
    fresh.step_number = loop.step_number
    fresh.grow.follow(resumed)
    torch.set_rng_state(drawn)
    run(loop, average, 12)
    torch.set_rng_state(drawn)
    run(fresh, resumed, 12)
    same(loop.host_state(), fresh.host_state())
    for kind in (host_parameters, host_buffers):
        same(dict(kind(average)), dict(kind(resumed)))
    for one, other in zip(average.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_average_of_the_model_is_refused():
    loop = Loop()
    with pytest.raises(UserError, match="no copy of the Net"):
        loop.grow.follow(torch.nn.Linear(3, 3))
    with pytest.raises(UserError, match="the model itself"):
        loop.grow.follow(loop.model)
    assert sample_loss(loop.model, loop.batch(1)).numel() == 12
