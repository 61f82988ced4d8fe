"""Seeds learn in a shadow forward of a compiled host's graph as they do outside of it, and outside where the graph does not serve."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import germinate, sample_loss, short

from esper.lifecycle import Stage
from tests.seeds.test_compiled_life import BACKEND, Run

pytestmark = pytest.mark.slow

LEARNING: dict[int, list[Any]] = {1: [germinate("fc1")], 2: [germinate("fc2"), germinate("fc2", 1)]}


def test_seeds_learn_in_a_shadow_forward_of_the_graph_as_they_do_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    given: dict[str, Any] = {"lifecycle": short(readiness=1.0, training_max="300step")}
    run, plain = Run(LEARNING, **given), Run(LEARNING, compiled=False, **given)
    for one in (run, plain):
        one.steps(8)
    outside: list[Any] = []
    monkeypatch.setattr(run.grow.objective, "_shadow_forward", lambda *given: outside.append(given))
    for one in (run, plain):
        one.steps(8)
    assert not outside and run.graphs.frame_count <= 5
    for mine, other in zip(run.grow.registry.layers, plain.grow.registry.layers, strict=True):
        for name, stack in other.bank("mlp").stacks.items():
            torch.testing.assert_close(mine.bank("mlp").stacks[name][: len(stack)], stack, rtol=1e-3, atol=1e-5)
    ready = run.grow.objective.readiness
    assert ready and ready == pytest.approx(plain.grow.objective.readiness, abs=1e-4)
    assert run.grow.meter.spent["shadow"] == plain.grow.meter.spent["shadow"]
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def outside_the_graph(model: torch.nn.Module) -> None:
    layer = model.get_submodule("fc2")
    layer.forward = torch.compiler.disable(layer.forward)


def not_to_be_called_again(model: torch.nn.Module) -> None:
    """As a backend may fail that makes graphs of some kinds alone."""
    model.register_forward_pre_hook(lambda module, _: None if next(module.parameters()).requires_grad else 1 / 0)


@pytest.mark.parametrize("change", [outside_the_graph, not_to_be_called_again])
def test_seeds_of_a_host_whose_graph_does_not_serve_them_learn_all_the_same(change: Callable[[torch.nn.Module], None]) -> None:
    torch.compiler.reset()
    given: dict[str, Any] = {"lifecycle": short(readiness=1.0, training_max="300step")}
    run, plain = Run(LEARNING, compiled=False, **given), Run(LEARNING, compiled=False, **given)
    change(run.model)
    run.call = torch.compile(run.model, backend=BACKEND)
    for one in (run, plain):
        one.steps(10)
    assert run.grow.registry.compiled.sites, "a graph holds them"
    assert run.grow.objective.in_graph.serves is (change is outside_the_graph)
    assert run.grow.objective.readiness == pytest.approx(plain.grow.objective.readiness, abs=1e-4)
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_the_sites_of_earlier_shadow_forwards_are_freed() -> None:
    torch.compiler.reset()
    run = Run(LEARNING, lifecycle=short(readiness=1.0, training_max="300step")).steps(6)
    compiled, training = run.grow.registry.compiled, list(run.grow.registry.in_stage(Stage.TRAINING))
    earlier = compiled.shadow(training)
    assert earlier is not None
    sites = [weakref.ref(site) for site in earlier.sites]
    compiled.refresh([0])
    assert compiled.shadow(training) is not earlier
    del earlier
    gc.collect()
    assert [site() for site in sites] == [None, None]


def test_a_whole_step_that_is_compiled_grows_and_one_without_gradients_for_the_host_does_too() -> None:
    torch.compiler.reset()
    run = Run(LEARNING, lifecycle=short(readiness=1.0, training_max="300step"))
    run.step = torch.compile(run.step, backend=BACKEND)  # type: ignore[method-assign]
    run.call = run.model
    for _ in range(4):
        run.step()
    other = Run(LEARNING, lifecycle=short(readiness=1.0, training_max="300step"))
    for _ in range(4):
        data = other.batch(other.number)
        loss = sample_loss(other.call, data).mean()
        loss.backward()
        other.model.requires_grad_(False)  # as a loop with two networks does
        other.grow.after_backward(data, loss.detach())
        other.model.requires_grad_(True)
        other.grow.tick(loss.detach())
        other.optimizer.zero_grad()
        other.number += 1
    assert run.grow.objective.readiness and other.grow.objective.readiness


def test_a_branch_that_is_not_finite_in_shadow_goes_and_its_neighbour_learns_on() -> None:
    torch.compiler.reset()
    run = Run(LEARNING, lifecycle=short(readiness=1.0, training_max="300step")).steps(6)
    with torch.no_grad():
        run.grow.registry.layers[1].bank("mlp").stacks["w2"][0] = float("nan")
    run.steps(3)
    assert [branch.stage.name in ("CULLED", "DORMANT") for branch in run.grow.registry.branches.entries] == [False, True, False]
    assert run.stages >= {"CULLED"} and len(run.grow.objective.readiness) == 2
