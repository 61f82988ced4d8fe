"""While a seed learns apart, the host feels nothing: no gradient bit, no clip norm, no buffer, no random number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import Loop, batch, germinate, same, short

from esper.blueprints import Block, Conv
from esper.engine.device_readings import Readings
from esper.engine.extra_passes import host_parameters
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.lifecycle import Stage
from esper.lifecycle.config import OBJECTIVES

LONG = "300step"


def lasting(objective: str) -> dict[str, Any]:
    return {"lifecycle": short(objective=objective, readiness=1.0, training_max=LONG)}


def learning(host: str, objective: str, **settings: Any) -> Loop:
    loop = Loop(host, settings=lasting(objective) | settings)
    loop.port.script = {1: [germinate(site.name) for site in loop.grow.registry.sites]}
    return loop


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("host", ["dropout", "batch_norm", "cnn_batch", "transformer"])
def test_a_training_seed_changes_no_host_bit(host: str, objective: str):
    bare, seeded = Loop(host, seeds=False), learning(host, objective)
    for _ in range(9):
        torch.manual_seed(bare.step_number)
        expected, drawn = bare.backward(), torch.rand(1)
        torch.manual_seed(seeded.step_number)
        assert seeded.backward() == expected
        assert torch.equal(torch.rand(1), drawn), "as many random numbers were drawn"
        same(seeded.host_gradients(), bare.host_gradients())
        norms = [torch.nn.utils.clip_grad_norm_(list(host_parameters(x.model).values()), 0.1) for x in (bare, seeded)]
        assert torch.equal(*norms)
        everything = torch.nn.utils.get_total_norm([p.grad for p in seeded.model.parameters() if p.grad is not None])
        assert torch.allclose(everything, norms[0].clamp(max=0.1)), "nor is there a gradient beside the host's"
        for loop in (bare, seeded):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            loop.step_number += 1
        seeded.grow.tick(expected)
        same(seeded.host_state(), bare.host_state())
    branches = seeded.grow.registry.in_stage(Stage.TRAINING)
    assert len(branches) == len(seeded.grow.registry.sites)
    assert all(branch.id in seeded.grow.objective.readiness for branch in branches)
    for branch in branches:
        bank = seeded.grow.registry.layers[branch.site].bank("mlp")
        assert int(bank.steps[branch.slot]) >= 6, "it did learn"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("start", ["copy", "zero_copy"])
def test_nor_does_a_training_block_with_norm_statistics_and_dropout_of_its_own(objective: str, start: str):
    if (objective, start) == ("reconstruction", "zero_copy"):
        start = "copy"  # a block that adds nothing reconstructs perfectly: it would be ready at once
    for host in ("cnn_batch", "transformer"):
        seeded = learning(host, objective, blueprint=Block(start=start)).run(6)
        same(seeded.host_state(), Loop(host, seeds=False).run(6).host_state())
        branch = seeded.grow.registry.in_stage(Stage.TRAINING)[0]
        bank = seeded.grow.registry.layers[branch.site].bank("block")
        assert bank.steps[str(branch.slot)] >= 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nor_does_a_training_convolution(objective: str):
    seeded = learning("cnn_batch", objective, blueprint=Conv()).run(6)
    same(seeded.host_state(), Loop("cnn_batch", seeds=False).run(6).host_state())
    branch = seeded.grow.registry.in_stage(Stage.TRAINING)[0]
    assert seeded.grow.registry.layers[branch.site].bank("conv").steps[branch.slot] >= 3, "and it does learn"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_learnt(objective: str):
    loop = Loop(
        "mlp",
        settings=lasting(objective)
        | {
            "lifecycle": short(objective=objective, readiness=1.0, training_max="700step", grafting_max="700step"),
            "learning": BranchLearning(0.01),
        },
        total=2000,
        lr=0.0,
    )
    loop.port.script = {1: [germinate("fc2", 0), germinate("fc2", 1)]}
    data = batch(size=64)
    loop.step(data)
    scores = []
    for _ in range(150):
        loop.step(data)
        scores.append(min(loop.grow.objective.readiness.values(), default=float("nan")))
    assert scores[-1] > scores[2] + 0.02 and scores[-1] > 0.0, (scores[2], scores[-1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_score_that_is_read_a_step_later_is_the_same(objective: str):
    """As on a GPU, for which nothing waits while a seed learns."""
    settings = {"lifecycle": short(objective=objective, readiness=1.0, training_max="200step")}
    loops = [Loop("mlp", settings=settings, commands={1: [germinate("fc2", 0), germinate("fc2", 1)]}) for _ in range(2)]
    loops[1].grow.readings.late = True
    found: list[list[dict[int, float]]] = [[], []]
    for _ in range(12):
        for loop, scores in zip(loops, found, strict=True):
            loop.step()
            scores.append(dict(loop.grow.objective.readiness))
    assert found[0][-2] and found[1][-1] == pytest.approx(found[0][-2], rel=1e-5)
    assert found[1][-1] != found[1][-2], "every step has its score"


def recorded(loop: Loop, data: Any, run: Callable[[], Any]) -> list[torch.Tensor]:
    masks: list[torch.Tensor] = []
    hook = loop.model.drop.register_forward_hook(lambda module, inputs, output: masks.append((output == 0).clone()))
    run()
    hook.remove()
    return masks


@pytest.mark.parametrize("objective", ["shadow", "functional_gradient"])
def test_extra_forwards_use_the_dropout_masks_of_the_live_one(objective: str):
    loop = learning("dropout", objective).run(3)
    with torch.no_grad():  # zeros after the activation are the masks' alone
        loop.model.fc1.bias.fill_(100.0)
    data = batch()
    masks = recorded(loop, data, lambda: loop.backward(data))
    assert len(masks) == {"shadow": 2, "functional_gradient": 1}[objective] or len(masks) == 6
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])
    assert 0 < int(masks[0].sum()) < masks[0].numel()
    later = recorded(loop, data, lambda: loop.model(data[0]))
    assert not torch.equal(masks[0], later[0]), "afterwards the random numbers go on"


def test_a_shadow_forward_keeps_the_masks_where_a_block_draws_its_own():
    loop = learning("transformer", "shadow", blueprint="block")
    loop.run(3)
    drawn: list[torch.Tensor] = []
    last = loop.model.blocks[0].drop2
    ours = {id(m) for layer in loop.grow.registry.layers for m in layer.modules()}
    assert id(last) not in ours
    last.register_forward_hook(lambda m, inputs, output: drawn.append(output == 0))
    loop.backward()
    assert len(drawn) == 2 and torch.equal(*drawn)


def test_a_loop_that_gives_no_loss_costs_one_more_forward_and_changes_no_bit():
    loop = learning("batch_norm", "shadow")
    for _ in range(6):
        data = batch(number=loop.step_number)
        loss = torch.nn.functional.cross_entropy(loop.model(data[0]), data[1])
        loss.backward()
        loop.grow.after_backward(data)
        loop.optimizer.step()
        loop.grow.tick(loss)
        loop.optimizer.zero_grad()
        loop.step_number += 1
    same(loop.host_state(), Loop("batch_norm", seeds=False).run(6).host_state())
    assert loop.grow.objective.readiness and loop.grow.meter.spent["objective"] > 0


def test_a_posted_number_is_read_without_its_graph_on_every_device():
    read: list[torch.Tensor] = []
    loss, plain = torch.ones((), requires_grad=True) * 2.0, torch.zeros(3)
    Readings(torch.device("cpu")).post([loss, plain], read.extend)
    assert not read[0].requires_grad and float(read[0]) == 2.0 and read[1] is plain, "a tensor without a graph costs no operation"


def test_a_site_on_data_or_frozen_layers_learns_from_the_gradient_there_all_the_same():
    loop = learning("mlp", "functional_gradient")
    for parameter in loop.model.fc1.parameters():
        parameter.requires_grad_(False)
    loop.run(10)
    assert loop.grow.objective.readiness[0] > 0.0


def test_a_site_that_no_gradient_reaches_teaches_nothing_and_ends_in_its_cull():
    loop = learning("mlp", "functional_gradient", lifecycle=short(objective="functional_gradient", training_max="5step"))
    loop.model.fc1.register_forward_hook(lambda module, inputs, output: output.detach())
    loop.run(10)
    assert [said.target for said in loop.port.transitions if said.site == "fc1"][2] == Stage.CULLED
    assert loop.grow.gates.counts["readiness"].passed == 1, "the other site's gate opened"
