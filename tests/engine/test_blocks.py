"""Depth growth in a training loop: a whole stack in one event, α at once, the optimizer state of copies, blocks that run twice."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Loop, Notebook, batch, build, germinate, sample_loss, short
from torch import nn

from esper import load_model
from esper.blueprints import Block, BlockBank
from esper.engine.attach import attach
from esper.engine.grow import Grow
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.engine.learning.muon import muon_for
from esper.engine.snapshot import branch_state, restore_branch
from esper.errors import UserError
from esper.grafting.config import LinearConfig
from esper.lifecycle import Stage
from esper.messages import Alert

AT_ONCE = {
    "sites": ["blocks.2"],
    "grafting": LinearConfig(ramp="0step"),
    "lifecycle": short(training_min="0step", grafting_min="50step", grafting_max="90step"),
}


def deep(blueprint: Block, **changes: Any) -> Loop:
    """A decoder of three blocks behind whose last one something germinates at tick 3."""
    settings = AT_ONCE | {"blueprint": blueprint, "learning": BranchLearning(0.01, 0.1)} | changes
    return Loop("decoder", settings=settings, commands={3: [germinate("blocks.2")]})


def bank_of(loop: Loop) -> BlockBank:
    bank = loop.grow.registry.layers[0].bank("block")
    assert isinstance(bank, BlockBank)
    return bank


def stacked(model: nn.Module, order: list[int]) -> nn.Module:
    plain: Any = copy.deepcopy(model)
    plain.blocks = nn.ModuleList([copy.deepcopy(plain.blocks[number]) for number in order])
    return plain


def test_three_blocks_become_twelve_in_one_event_that_is_one_branch() -> None:
    loop = deep(Block(start="copy", source="stack", blocks=9, state="copied"))
    loop.until(Stage.GRAFTING)
    (branch,) = loop.grow.registry.branches.entries
    assert branch.parameters == 3 * sum(p.numel() for p in build("decoder").blocks.parameters())
    grown, inputs = loop.grow.export().double(), batch("decoder", 5)[0]
    assert len(bank_of(loop).blocks[str(branch.slot)]) == 9
    by_hand = stacked(build("decoder"), [0, 1, 2] * 4)
    copies = bank_of(loop).blocks[str(branch.slot)]
    host = {name: value for name, value in loop.host_state().items() if not name.startswith("blocks.")}
    by_hand.load_state_dict(host, strict=False)
    for number, block in enumerate([*loop.model.blocks, *copies]):
        own = {name: value for name, value in block.state_dict().items() if "seed_layer" not in name}
        by_hand.blocks[number].load_state_dict(own)
    torch.testing.assert_close(grown(inputs), by_hand.double()(inputs))


def test_alpha_is_one_at_once_and_the_branch_learns_while_blending_lasts() -> None:
    loop = deep(Block(start="copy"))
    branch = loop.until(Stage.GRAFTING)
    assert float(loop.grow.registry.branches.alpha[0]) == 1.0, "in the first forward that has it"
    before = {name: p.detach().clone() for name, p in bank_of(loop).blocks["0"].named_parameters()}
    loop.run(20)
    assert branch.stage is Stage.GRAFTING and int(bank_of(loop).steps["0"]) >= 20
    assert all(not torch.equal(p, before[name]) for name, p in bank_of(loop).blocks["0"].named_parameters())
    loop.run(35)
    assert branch.stage is not Stage.GRAFTING, "lifecycle.grafting_min is over"


def test_copied_moments_make_a_copy_move_as_its_original_does() -> None:
    """From one state and one gradient, host and branch take the same step."""
    loop = deep(Block(start="copy", state="copied"), learning=BranchLearning(0.01, 0.1))
    original = loop.model.blocks[2]
    loop.run(2)
    loop.port.script = {3: [germinate("blocks.2")]}
    loop.step()
    bank = bank_of(loop)
    assert bank.steps["0"] == 3
    named = {name: p for name, p in original.named_parameters() if "seed_layer" not in name}
    for name, parameter in bank.blocks["0"].named_parameters():
        held = loop.optimizer.state[named[name]]
        assert torch.equal(bank.moments["0"][name][0], held["exp_avg"]) and torch.equal(bank.moments["0"][name][1], held["exp_avg_sq"])
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        named[name].grad = parameter.grad.clone()
    loop.optimizer.step()
    loop.grow.branch_optimizer.step([loop.grow.registry.branches[0]], 1.0)
    for name, parameter in bank.blocks["0"].named_parameters():
        torch.testing.assert_close(parameter, named[name])


def test_copied_momentum_of_muon_makes_a_copy_move_as_its_original_does() -> None:
    model = build("decoder")
    optimizer = muon_for(model, 0.01, 0.1, outputs=5)
    port = Notebook({3: [germinate("blocks.2")]})
    blueprint = Block(start="copy", state="copied")
    data: Any = [batch("decoder", 900)]
    grow = attach(model, loss=sample_loss, total_steps=100, optimizer=optimizer, port=port, judge=data, **AT_ONCE, blueprint=blueprint)
    for number in range(3):
        step(model, optimizer, grow, number)
    bank = grow.registry.layers[0].bank("block")
    named = {name: p for name, p in model.blocks[2].named_parameters() if "seed_layer" not in name}
    for name, parameter in bank.blocks["0"].named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        named[name].grad = parameter.grad.clone()
    optimizer.step()
    grow.branch_optimizer.step([grow.registry.branches[0]], 1.0)
    for name, parameter in bank.blocks["0"].named_parameters():
        torch.testing.assert_close(parameter, named[name])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, grow: Grow, number: int) -> None:
    data = batch("decoder", number)
    loss = sample_loss(model, data).mean()
    loss.backward()
    grow.after_backward(data, loss)
    optimizer.step()
    grow.tick(loss.detach())
    optimizer.zero_grad()


@pytest.mark.parametrize(("state", "share"), [("reset", 0.25), ("zero", 1.0)])
def test_without_moments_the_first_step_is_whole_or_that_of_a_warm_up(state: str, share: float) -> None:
    loop = deep(Block(start="copy", state=state), learning=BranchLearning(0.01), warmup="4step").run(3)
    bank = bank_of(loop)
    assert bank.steps["0"] == 0 and not any(moment.any() for pair in bank.moments["0"].values() for moment in pair)
    before = {name: p.detach().clone() for name, p in bank.blocks["0"].named_parameters()}
    for parameter in bank.blocks["0"].parameters():
        parameter.grad = torch.ones_like(parameter)
    loop.grow.branch_optimizer.step([loop.grow.registry.branches[0]], 1.0)
    for name, parameter in bank.blocks["0"].named_parameters():
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 0.01 * share), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "rule"), [(torch.optim.SGD, "adamw"), (torch.optim.AdamW, "muon")])
def test_moments_of_another_kind_are_not_copied(kind: Any, rule: str) -> None:
    model = build("decoder")
    learning = BranchLearning(0.01, rule=rule)
    with pytest.raises(UserError, match=rf"^blueprint\.state=copied .* learn by {rule}, but the host has {kind.__name__}"):
        attach(
            model, loss=sample_loss, total_steps=9, optimizer=kind(model.parameters(), 0.1), judge=[batch("decoder")],
            blueprint=Block(state="copied"), learning=learning,
        )  # fmt: skip


def test_a_block_run_twice_teaches_the_host_and_adds_no_parameter_until_it_is_untied() -> None:
    loop = deep(Block(start="shared", untie="10step", state="copied"))
    alerts: list[Alert] = loop.port.alerts
    branch = loop.until(Stage.GRAFTING)
    reference = copy.deepcopy(build("decoder"))
    reference.load_state_dict(loop.host_state())
    data = loop.batch(loop.step_number)
    looped = stacked(reference, [0, 1, 2])
    looped.blocks.append(looped.blocks[2])  # the same module twice: torch sums both gradients
    sample_loss(looped, data).mean().backward()
    sample_loss(loop.model, data).mean().backward()
    theirs = dict(looped.named_parameters())
    for name, gradient in loop.host_gradients().items():
        torch.testing.assert_close(gradient, theirs[name].grad)
    loop.optimizer.zero_grad()
    bank, key = bank_of(loop), str(branch.slot)
    assert branch.parameters == 0 and bank.tied == {key}
    began = loop.grow.tick_number
    while bank.tied:
        inputs = loop.batch(77)[0]
        loop.step()
    assert loop.grow.tick_number == began + 10 and [alert.code for alert in alerts] == ["untied"]
    assert branch.parameters == sum(p.numel() for p in reference.blocks[2].parameters())
    own = dict(loop.model.blocks[2].named_parameters())
    for name, parameter in bank.blocks[key].named_parameters():
        assert torch.equal(parameter, own[name]), "it begins as what it shared"
        assert torch.equal(bank.moments[key][name][0], loop.optimizer.state[own[name]]["exp_avg"])
    torch.testing.assert_close(loop.grow.export()(inputs), loop.model.eval()(inputs))
    loop.model.train()
    loop.run(3)
    assert not torch.equal(bank.blocks[key].mlp.fc1.weight, loop.model.blocks[2].mlp.fc1.weight)


def test_a_tied_branch_is_exported_with_the_values_that_it_shares() -> None:
    loop = deep(Block(start="shared", source="stack", blocks=3))
    loop.until(Stage.GRAFTING)
    loop.run(5)
    plain, inputs = loop.grow.export(), loop.batch(50)[0]
    torch.testing.assert_close(plain.eval()(inputs), loop.model.eval()(inputs))
    assert not any("seed_layer" in name for name in plain.state_dict())


def test_a_saved_stack_is_loaded_into_a_fresh_host(tmp_path: Path) -> None:
    loop = deep(Block(start="copy", source="stack", blocks=4))
    loop.until(Stage.GRAFTING)
    path, inputs = loop.grow.save(tmp_path / "model"), loop.batch(50)[0]
    torch.testing.assert_close(load_model(path, build("decoder")).eval()(inputs), loop.model.eval()(inputs))
    description = json.loads((path / "model.json").read_text())
    description["grown"][0][0]["branches"][0]["blocks"] = 0.5
    (path / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"blocks is '0\.5' where it must be a whole number"):
        load_model(path, build("decoder"))


def test_a_snapshot_from_before_the_untying_brings_back_what_was_shared_then() -> None:
    loop = deep(Block(start="shared", untie="5step"))
    branch = loop.until(Stage.GRAFTING)
    saved = branch_state(loop.grow.registry, branch.id)
    shared = {name: p.detach().clone() for name, p in loop.model.blocks[2].named_parameters() if "seed_layer" not in name}
    loop.run(8)
    assert not bank_of(loop).tied
    with torch.no_grad():
        restore_branch(loop.grow.registry, branch.id, saved)
    for name, parameter in bank_of(loop).blocks[str(branch.slot)].named_parameters():
        assert torch.equal(parameter, shared[name])


def test_an_average_has_a_shared_block_twice_and_its_copy_afterwards() -> None:
    loop = deep(Block(start="shared", untie="6step"))
    averaged = torch.optim.swa_utils.AveragedModel(loop.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    loop.grow.follow(averaged)
    for number in range(14):
        loop.step()
        averaged.update_parameters(loop.model)
        inputs = loop.batch(60)[0]
        if loop.grow.registry.branches.entries and bank_of(loop).tied and number > 5:
            twice = copy.deepcopy(build("decoder"))
            own = {name: value for name, value in averaged.module.state_dict().items() if "seed_layer" not in name}
            twice.load_state_dict(own)
            twice.blocks.append(twice.blocks[2])
            torch.testing.assert_close(averaged.module.eval()(inputs), twice.eval()(inputs))
    assert not bank_of(loop).tied
