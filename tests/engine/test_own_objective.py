"""Branches of one run may learn from different objectives, and an event repeats why a branch was grown."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from growing import Loop, germinate, same, short

from esper.blueprints import Width
from esper.lifecycle import Stage
from esper.messages import EmergencyStop, Germinate

LASTING = {"lifecycle": short(readiness=1.0, training_max="200step")}


def learning(*objectives: str, steps: int = 8, **settings: object) -> Loop:
    """A loop whose seeds of fc1 are TRAINING, each by its own objective."""
    commands = [germinate("fc1", seed, objective=objective) for seed, objective in enumerate(objectives)]
    return Loop("dropout", commands={1: commands}, settings=LASTING | settings).run(steps)


def weights(loop: Loop, seed: int) -> torch.Tensor:
    """The parameters of a seed's branch, flat."""
    (branch,) = [one for one in loop.grow.registry.in_stage(Stage.TRAINING) if one.seed == seed]
    bank = loop.grow.registry.layers[branch.site].bank(branch.blueprint)
    return torch.cat([value[branch.slot].flatten() for value in bank.stacks.values()]).detach().clone()


def test_each_branch_learns_from_its_own_objective_beside_the_other():
    both = learning("", "functional_gradient")
    shadow, regression = learning("shadow"), learning("shadow", "functional_gradient", steps=8)
    assert torch.equal(weights(both, 0), weights(regression, 0)), "an empty name is the run's own"
    assert torch.equal(weights(both, 0), weights(shadow, 0)), "the neighbour's regression does not touch the shadow pass"
    alone = Loop("dropout", commands={1: [germinate("fc1", 1, objective="functional_gradient")]}, settings=LASTING).run(8)
    assert torch.equal(weights(both, 1), weights(alone, 1))
    assert alone.grow.meter.spent.get("shadow", 0) == 0 < alone.grow.meter.spent["objective"]
    same(both.host_state(), Loop("dropout", seeds=False).run(8).host_state())


def test_objectives_that_cannot_be_there_are_refused_with_the_reason():
    loop = learning("reconstruction", "luck")
    (status, reason), other = loop.port.acks["germinate-fc1-0"], loop.port.acks["germinate-fc1-1"]
    assert status == "refused" and "reconstruction starts from other weights" in reason
    assert other == ("refused", "there is no objective 'luck'; there are shadow, functional_gradient, reconstruction")
    refusal = loop.grow.objective.refusal("functional_gradient", Width())
    assert refusal == "blueprint width learns by objective shadow alone: it reads elsewhere"


def test_an_own_objective_is_in_a_saved_state():
    loop = learning("", "functional_gradient", steps=4)
    saved = loop.grow.state()
    assert [entry["objective"] for entry in saved["grow"]["garden"]["branches"]["entries"]] == ["", "functional_gradient"]


@pytest.mark.parametrize("why", [{}, {"controller": "mine", "features": {"health": 0.25}}])
def test_the_event_repeats_the_explanation_and_names_the_objective(why: dict[str, object]):
    command = dataclasses.replace(germinate("fc1", 0, objective="functional_gradient"), why=why)
    assert isinstance(command, Germinate)
    loop = Loop("mlp", commands={1: [command]}, settings=LASTING).run(3)
    first, second = loop.port.transitions[:2]
    assert first.why == why and second.why == {}
    assert first.objective == second.objective == "functional_gradient"


def test_the_event_of_a_stop_repeats_its_explanation():
    why = {"controller": "mine", "expected": -0.1}
    loop = Loop("mlp", commands={1: [germinate("fc1", 0)], 2: [EmergencyStop(id="stop", why=why)]}, settings=LASTING).run(3)
    stopped = [event for event in loop.port.transitions if event.target == Stage.CANCELLED]
    assert [event.why for event in stopped] == [why]
