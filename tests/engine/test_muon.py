"""Muon for matrices, AdamW for all others: step for step torch's own, for hosts and for what grows beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from growing import Loop, build, germinate, sample_loss
from torch import nn

from esper.engine.attach import attach
from esper.engine.learning.branch_optimizer import BranchLearning, BranchOptimizer, HostRate
from esper.engine.learning.muon import MuonAdamW, matrices_of, muon_for, orthogonalised
from esper.engine.snapshot import optimizer_state, restore_optimizer
from esper.errors import UserError


def reference(parameters: list[nn.Parameter], flags: list[bool], lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """torch's own two over the same parameters, all matrices flat."""
    matrices = [p for p, flag in zip(parameters, flags, strict=True) if flag]
    others = [p for p, flag in zip(parameters, flags, strict=True) if not flag]
    return [
        torch.optim.Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=decay),
    ]


def drawn(shape: torch.Size, draws: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=draws)


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 4, 9), (1, 5, 5)])
def test_singular_values_become_nearly_one_and_singular_vectors_stay(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalised(matrices).double()
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    core = left.mT @ found @ right.mT
    sizes = torch.diagonal(core, dim1=1, dim2=2)
    assert bool((sizes > 0.3).all()) and bool((sizes < 1.3).all()), "the published coefficients map into about 0.7 … 1.2"
    torch.testing.assert_close(core, torch.diag_embed(sizes), rtol=0.0, atol=0.06)  # bfloat16
    one = orthogonalised(matrices[:1] * 1024.0)
    torch.testing.assert_close(one, orthogonalised(matrices)[:1], rtol=0.0, atol=0.04)


def test_embeddings_the_head_vectors_and_grouped_filters_are_left_to_adamw():
    transformer = build("transformer")
    names = {"attention.qkv.weight", "attention.output.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert matrices_of(transformer) == {f"blocks.0.{name}" for name in names} | {"head.weight"}
    optimizer = muon_for(transformer, 1e-3, 0.1, outputs=5)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert len(optimizer.param_groups[1]["params"]) == len(list(transformer.parameters())) - 4
    tied = build("transformer")
    tied.head.weight = tied.characters.weight
    assert "head.weight" not in matrices_of(tied) and len(matrices_of(tied)) == 4
    assert matrices_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3))) == {"1.weight"}
    fewer = muon_for(build("transformer"), 1e-3, 0.1, outputs=5, adamw=["*.qkv.weight"])
    assert len(fewer.param_groups[0]["params"]) == 3
    with pytest.raises(UserError, match=r"^optimizer.adamw: '\*.qvk' is no parameter of the model; it has characters.weight"):
        muon_for(transformer, 1e-3, 0.1, adamw=["*.qvk"])


@pytest.mark.parametrize("host", ["transformer", "cnn_group", "mlp"])
def test_a_host_moves_as_under_torchs_own_two_optimizers(host: str):
    mine, other = build(host), build(host)
    optimizer = muon_for(mine, 0.02, 0.1)
    flags = [name in matrices_of(mine) for name, _ in mine.named_parameters()]
    flat = [nn.Parameter(p.detach().flatten(1) if flag else p.detach()) for p, flag in zip(other.parameters(), flags, strict=True)]
    theirs = reference(flat, flags, 0.02, 0.1)
    draws = torch.Generator().manual_seed(3)
    for step in range(6):
        for parameter, twin in zip(mine.parameters(), flat, strict=True):
            parameter.grad = drawn(parameter.shape, draws)
            twin.grad = parameter.grad.reshape(twin.shape).clone()
        for one in (optimizer, *theirs):
            for group in one.param_groups:
                group["lr"] = 0.02 / (step + 1)
            one.step()
    for parameter, twin in zip(mine.parameters(), flat, strict=True):  # matrices of a shape are multiplied together, in bfloat16
        torch.testing.assert_close(parameter.flatten(), twin.flatten(), rtol=0.0, atol=2e-4)


def test_filters_whose_channels_lie_last_in_memory_move_too():
    plain, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    other.load_state_dict(plain.state_dict())
    other.to(memory_format=torch.channels_last)
    for layer in (plain, other):
        layer.weight.grad = drawn(layer.weight.shape, torch.Generator().manual_seed(0))
        muon_for(layer, 0.1, 0.0).step()
    assert torch.equal(plain.weight, other.weight)


@pytest.mark.parametrize("way", ["torch", "esper"])
def test_a_saved_state_goes_on_with_the_same_bits(way: str):
    first, second = build("cnn_group"), build("cnn_group")
    one, two = muon_for(first, 0.02, 0.1), muon_for(second, 0.02, 0.1)
    draws = torch.Generator().manual_seed(3)
    gradients = [[drawn(p.shape, draws) for p in first.parameters()] for _ in range(5)]

    def step(model: nn.Module, optimizer: MuonAdamW, number: int) -> None:
        for parameter, gradient in zip(model.parameters(), gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    for number in range(3):
        step(first, one, number)
    second.load_state_dict(first.state_dict())
    if way == "torch":
        two.load_state_dict(copy.deepcopy(one.state_dict()))
    else:
        restore_optimizer(two, copy.deepcopy(optimizer_state(one)))
    for number in range(3, 5):
        step(first, one, number)
        step(second, two, number)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_parameter_added_while_training_moves_and_changes_no_other():
    model = build("mlp")
    optimizer = muon_for(model, 0.02, 0.1)
    new, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    twin = build("mlp")
    alone = muon_for(twin, 0.02, 0.1)
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["params"].append(new)
            optimizer.param_groups[1]["params"].append(vector)
            before = new.detach().clone(), vector.detach().clone()
        draws = torch.Generator().manual_seed(step)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = drawn(parameter.shape, draws)
            other.grad = parameter.grad.clone()
        new.grad, vector.grad = torch.ones(4, 4), torch.ones(4)
        optimizer.step()
        alone.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(new, before[0]) and not torch.equal(vector, before[1])


@pytest.mark.parametrize("blueprint", ["mlp", "block"])
def test_a_branch_moves_as_under_torchs_own_two_optimizers(blueprint: str):
    learning = BranchLearning(0.02, 0.1, betas=(0.9, 0.95), warmup=5, rule="muon")
    site = "blocks.0" if blueprint == "block" else "fc1"
    loop = Loop("transformer" if blueprint == "block" else "mlp", settings={"blueprint": blueprint, "learning": learning})
    loop.port.script = {1: [germinate(site)]}
    loop.run(1)
    bank, branch = loop.grow.registry.layers[0].bank(blueprint), loop.grow.registry.branches[0]
    if blueprint == "block":
        held = dict(bank.blocks["0"].named_parameters())
        flags = [name in matrices_of(bank.blocks["0"]) for name in held]
        assert sum(flags) == 4
    else:
        held = dict(bank.stacks)
        flags = [name.startswith("w") for name in held]
        assert sum(flags) == 2 and bank.capacity == 1
    mine = list(held.values())
    twins = [nn.Parameter(p.detach().clone() if blueprint == "block" else p.detach()[0].clone()) for p in mine]
    theirs = reference(twins, flags, 0.02, 0.1)
    subject, draws = BranchOptimizer(loop.grow.registry, learning), torch.Generator().manual_seed(0)
    for step in range(1, 9):
        for parameter, twin in zip(mine, twins, strict=True):
            parameter.grad = drawn(parameter.shape, draws)
            twin.grad = parameter.grad.reshape(twin.shape).clone()
        for one in theirs:
            one.param_groups[0]["lr"] = 0.02 * 0.7 * min(1.0, step / 5)
            one.step()
        subject.step([branch], 0.7)
        for parameter, twin in zip(mine, twins, strict=True):
            torch.testing.assert_close(parameter.reshape(twin.shape), twin, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_learn_never_move():
    learning = BranchLearning(0.02, 0.1, rule="muon")
    loop = Loop(commands={1: [germinate(seed=0), germinate(seed=1)]}, settings={"learning": learning}).run(4)
    bank, (first, second) = loop.grow.registry.layers[0].bank("mlp"), loop.grow.registry.branches.entries
    before = {name: stack.detach().clone() for name, stack in bank.stacks.items()}
    for stack in bank.stacks.values():
        stack.grad = torch.ones_like(stack)
    bank.stacks["w2"].grad[second.slot] = float("nan")
    loop.grow.branch_optimizer.step([first, second], 1.0)
    for name, stack in bank.stacks.items():
        assert torch.equal(stack[second.slot], before[name][second.slot])
        assert not torch.equal(stack[first.slot], before[name][first.slot])


def test_branches_beside_the_optimizer_follow_its_rules_unless_told_otherwise():
    model = build("transformer")
    optimizer = muon_for(model, 0.02, 0.1, momentum=0.9, outputs=5)
    assert HostRate(optimizer).learning() == BranchLearning(0.02, 0.1, (0.9, 0.95), rule="muon", momentum=0.9)
    data: Any = [(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64))]
    grow = attach(model, loss=sample_loss, total_steps=10, optimizer=optimizer, judge=data)
    assert grow.branch_optimizer.learning.rule == "muon"
    with pytest.raises(UserError, match="the rule is adamw or muon"):
        BranchLearning(0.1, rule="lion")


def test_whole_banks_of_which_some_rows_learn_are_stepped_as_single_branches_are():
    """As on a device whose numbers are known a step later: ``Readings.late``."""
    states = []
    for late in (False, True):
        learning = BranchLearning(0.02, 0.1, warmup=3, clip=0.5, rule="muon")
        commands = {1: [germinate(seed=0), germinate(seed=1), germinate(seed=2)]}
        loop = Loop(commands=commands, settings={"learning": learning, "per_site": 4}).run(6)
        optimizer, (first, second, _) = loop.grow.branch_optimizer, loop.grow.registry.branches.entries
        optimizer.readings.arrive()
        optimizer.readings.late = late
        bank = loop.grow.registry.layers[0].bank("mlp")
        for step in range(4):
            draws = torch.Generator().manual_seed(step)
            for stack in bank.stacks.values():
                stack.grad = drawn(stack.shape, draws)
            bank.stacks["w1"].grad[second.slot, 0, 0] = float("nan")
            optimizer.step([first, second], 0.7)
            optimizer.readings.send()
        optimizer.readings.arrive()
        moments = [moment for pair in bank.moments.values() for moment in pair]
        states.append([*(stack.detach() for stack in bank.stacks.values()), *moments, bank.steps])
    for alone, whole in zip(*states, strict=True):
        torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
