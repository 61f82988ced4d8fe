"""Seeds that are not active change no bit: of outputs, gradients, updates, statistics, or random numbers."""

from __future__ import annotations

import pytest
import torch
from growing import HOSTS, Loop, batch, build, germinate, same, sample_loss, short
from torch import nn

from esper.blueprints import Conv
from esper.lifecycle import Stage

IDLE = {"lifecycle": short(training_slots=1, training_max="300step", readiness=1.0)}


def first_site(host: str) -> str:
    return Loop(host).grow.registry.sites[0].name


@pytest.mark.parametrize("host", list(HOSTS))
def test_dormant_seeds_change_no_bit(host: str):
    bare, seeded = Loop(host, seeds=False), Loop(host)
    for _ in range(12):  # telemetry is due at tick 10
        data = batch(host, bare.step_number)
        torch.manual_seed(bare.step_number)
        expected = bare.backward(data)
        torch.manual_seed(seeded.step_number)
        assert seeded.backward(data) == expected
        same(seeded.host_gradients(), bare.host_gradients())
        for loop in (bare, seeded):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.step_number += 1
        seeded.grow.tick(expected)
        same(seeded.host_state(), bare.host_state())
    assert seeded.port.rows, "telemetry was read on the way"
    bare.model.eval()
    seeded.model.eval()
    assert torch.equal(bare.model(data[0]), seeded.model(data[0]))


@pytest.mark.parametrize("host", list(HOSTS))
def test_attaching_changes_no_bit_draws_nothing_and_keeps_the_mode(host: str):
    bare = build(host)
    torch.manual_seed(99)
    expected = torch.rand(3)
    seeded = Loop(host)
    assert torch.equal(torch.rand(3), expected), "no random number was drawn"
    same(seeded.host_state(), dict(bare.state_dict()))
    assert all(module.training for module in seeded.model.modules())
    assert sum(p.numel() for p in seeded.model.parameters()) == sum(p.numel() for p in bare.parameters())


@pytest.mark.parametrize("host", ["dropout", "batch_norm", "cnn_batch", "transformer"])
def test_a_seed_that_waits_for_a_slot_is_not_felt_even_with_parameters_of_nan(host: str):
    """GERMINATED: ``0·inf`` would be NaN, weight decay would move, a forward would draw or drift."""
    bare = Loop(host, seeds=False).run(8)
    site = first_site(host)
    waiting = Loop(host, {1: [germinate(site, 0)], 2: [germinate(site, 1)]}, IDLE)
    waiting.run(3)
    blocker, branch = waiting.grow.registry.branches.entries
    assert branch.stage is Stage.GERMINATED and blocker.stage is Stage.TRAINING
    bank = waiting.grow.registry.layers[0].bank("mlp")
    with torch.no_grad():
        for stack in bank.stacks.values():
            stack[branch.slot] = float("nan")
    waiting.run(5)
    same(waiting.host_state(), bare.host_state())
    assert not bank.steps[branch.slot] and not any(first[branch.slot].any() for first, _ in bank.moments.values())
    assert all(bool(stack[branch.slot].isnan().all()) for stack in bank.stacks.values())
    assert bool(torch.isfinite(bank.stacks["w1"][blocker.slot]).all())
    assert torch.equal(torch.rand(1), _draw_after(Loop(host, seeds=False).run(8)))


def _draw_after(loop: Loop) -> torch.Tensor:
    return torch.rand(1)


@pytest.mark.parametrize("blueprint", ["mlp", "block", "conv"])
def test_a_waiting_seed_of_any_blueprint_is_not_felt(blueprint: str):
    grown = Conv() if blueprint == "conv" else blueprint
    settings = IDLE | {"blueprint": grown, "per_site": 1}
    loop = Loop("cnn_batch", settings=settings)
    names = [site.name for site in loop.grow.registry.sites]
    loop.port.script = {1: [germinate(names[0])], 2: [germinate(names[1])]}
    loop.run(6)
    assert loop.port.acks == {f"germinate-{names[0]}-0": ("applied", ""), f"germinate-{names[1]}-0": ("applied", "")}
    assert [branch.stage for branch in loop.grow.registry.branches.entries] == [Stage.TRAINING, Stage.GERMINATED]
    same(loop.host_state(), Loop("cnn_batch", seeds=False).run(6).host_state())


def test_an_in_place_activation_behind_a_blended_branch_trains_as_an_ordinary_one():
    def run(inplace: bool) -> Loop:
        loop = Loop("mlp", {1: [germinate()]})
        assert isinstance(loop.model.act1, nn.ReLU)
        loop.model.act1.inplace = inplace
        return loop.run(30)

    first, second = run(True), run(False)
    assert first.grow.registry.branches[0].stage is not Stage.DORMANT
    same(first.host_state(), second.host_state())
    assert sample_loss(first.model, batch()).tolist() == sample_loss(second.model, batch()).tolist()


def test_a_host_of_double_precision_stays_one():
    loop = Loop("mlp", {1: [germinate()]})
    loop.model.fc1.double()
    hidden = loop.model.fc1(torch.randn(2, 6, dtype=torch.float64))
    assert hidden.dtype == torch.float64
