"""A bank's optimizer step in one launch is torch's AdamW on each slot that learns, and touches no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import MLP
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.kernels.adamw import AdamWSettings, adamw
from tests.growing import Loop, germinate, short
from tests.kernels.sites import DEVICE

SHAPES = [(3, 5), (5,), (5, 1100), (1100,)]
LEARNING = torch.tensor([True, True, False, True])


@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_slots_that_learn_move_as_under_torch_and_the_others_not_at_all(clip: float, betas: tuple[float, float]) -> None:
    draws = torch.Generator().manual_seed(0)
    held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for shape in SHAPES:
        values, gradients = (torch.randn(4, *shape, generator=draws).to(DEVICE) for _ in range(2))
        held.append((values, gradients, torch.zeros_like(values), torch.zeros_like(values)))
    steps, before = torch.zeros(4, device=DEVICE), [entry[0].clone() for entry in held]
    twins = [[nn.Parameter(entry[0][slot].clone()) for entry in held] for slot in (0, 1)]
    optimizers = [torch.optim.AdamW(twin, 0.02, betas=betas, weight_decay=0.1) for twin in twins]
    for step in range(1, 8):
        for entry in held:
            entry[1].copy_(torch.randn(entry[1].shape, generator=draws))
        held[2][1][3, 2, 7] = float("nan" if step % 2 else "inf")
        for slot, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            for parameter, entry in zip(twin, held, strict=True):
                parameter.grad = entry[1][slot].clone()
            optimizer.param_groups[0]["lr"] = 0.02 * min(1.0, step / 5)
            if clip:
                nn.utils.clip_grad_norm_(twin, clip)
            optimizer.step()
        norms = adamw(held, LEARNING.to(DEVICE), steps, AdamWSettings(0.02, 5.0, *betas, 1e-8, 0.1, clip))
        own = torch.stack([torch.linalg.vector_norm(entry[1].flatten(1), dim=1) for entry in held]).square().sum(0).sqrt()
        torch.testing.assert_close(norms[:3], own[:3], rtol=1e-5, atol=1e-6)
        assert not norms[3].isfinite()
    assert steps.tolist() == [7.0, 7.0, 0.0, 0.0]
    for number, (values, _, first, second) in enumerate(held):
        for slot, twin in enumerate(twins):
            torch.testing.assert_close(values[slot], twin[number].detach(), rtol=1e-5, atol=1e-6)
        for slot in (2, 3):
            assert torch.equal(values[slot], before[number][slot]) and not first[slot].any() and not second[slot].any()


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.slow
def test_whole_banks_are_stepped_as_single_branches_are_and_failures_are_known_a_step_later(kernel: str) -> None:
    settings: dict[str, Any] = {
        "kernel": kernel, "blueprint": MLP(receptive_field="chunk", hidden=4), "sites": ["fc1"], "lifecycle": short(grafting_max="300step"),
        "learning": BranchLearning(0.02, weight_decay=0.1, warmup=3, clip=0.5), "per_site": 4,
    }  # fmt: skip
    commands = {1: [germinate(seed=0), germinate(seed=2)]}
    loops = [Loop(commands=commands, settings=settings, device=DEVICE).run(8) for _ in range(2)]
    states = []
    for loop, late in zip(loops, (False, True), strict=True):
        optimizer, branches = loop.grow.branch_optimizer, loop.grow.registry.branches.entries
        optimizer.readings.arrive()  # values that the loop itself left on their way
        optimizer.readings.late = late
        bank = loop.grow.registry.layers[0].bank("mlp")
        for step in range(4):
            draws = torch.Generator().manual_seed(step)
            for stack in bank.stacks.values():
                stack.grad = torch.randn(stack.shape, generator=draws).to(DEVICE)
            bank.stacks["w1"].grad[branches[1].slot, 0, 0] = float("nan")
            optimizer.step(branches, 0.7)
            assert not late or not optimizer.failures or step > 0, "not yet"
            optimizer.readings.send()
        optimizer.readings.arrive()
        assert optimizer.failures == {branches[1].id: 4}
        moments = [moment for pair in bank.moments.values() for moment in pair]
        states.append([*(stack.detach() for stack in bank.stacks.values()), *moments, bank.steps])
        states[-1].append(torch.tensor([optimizer.norms[branches[0].id]]))
    for alone, whole in zip(*states, strict=True):
        torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
