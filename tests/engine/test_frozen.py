"""A frozen host whose seeds sleep, were cancelled or were culled answers with the bits of one in which nothing ever germinated."""

from __future__ import annotations

import growing
import pytest
import torch
from growing import HOSTS, Loop, batch, build, germinate, same, set_stage, short
from torch import nn

from esper.grafting import CONFIGS as STRATEGIES
from esper.lifecycle import Stage

WAITING = {"lifecycle": short(training_slots=1, training_max="300step", readiness=1.0)}


def frozen_modes(host: nn.Module) -> nn.Module:
    """In training, but for the norms."""
    for module in host.train().modules():
        if hasattr(module, "track_running_stats"):
            module.eval()
    return host


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every host of these tests keeps its weights and its norm statistics."""

    def still(make):
        def made():
            return frozen_modes(make().requires_grad_(False))

        return made

    for name, make in list(HOSTS.items()):
        monkeypatch.setitem(growing.HOSTS, name, still(make))


def unchanged(loop: Loop) -> None:
    """Assert the untouched host's state, and its answers in training and in evaluation."""
    bare = build(loop.host)
    same(loop.host_state(), dict(bare.state_dict()))
    data = batch(loop.host, 77)[0]
    for train in (True, False):
        answers = []
        for model in (bare, loop.model):
            if not train:
                model.eval()
            torch.manual_seed(5)
            answers.append(model(data).detach())
        assert torch.equal(answers[0], answers[1])
    frozen_modes(loop.model)


@pytest.mark.parametrize("host", list(HOSTS))
def test_dormant_germinated_and_cancelled_seeds(frozen: None, host: str) -> None:
    names = [site.name for site in Loop(host).grow.registry.sites]
    script = {1: [germinate(names[0], 0)], 2: [germinate(names[-1], 1)], 5: [set_stage(Stage.CANCELLED, names[-1], 1)]}
    loop = Loop(host, script, WAITING).run(4)
    first, second = loop.grow.registry.branches.entries
    assert (first.stage, second.stage) == (Stage.TRAINING, Stage.GERMINATED)
    unchanged(loop)
    loop.run(6)
    assert "CANCELLED" in [name for name, _ in second.path] and not second.alive
    unchanged(loop)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("host", ["mlp", "batch_norm", "transformer"])
def test_culled_seeds_of_every_strategy(frozen: None, host: str, strategy: str) -> None:
    site = Loop(host).grow.registry.sites[0].name
    loop = Loop(host, {1: [germinate(site)]}, {"grafting": strategy, "lifecycle": short(gain=1e9)})
    branch = loop.until(Stage.GRAFTING)
    loop.run(3)
    assert float(loop.grow.registry.branches.alpha[branch.id]) > 0.0
    inputs = batch(host, 77)[0]
    assert not torch.equal(loop.model.eval()(inputs), build(host).eval()(inputs)), "it is felt while it is there"
    frozen_modes(loop.model)
    loop.until(Stage.CULLED, most=200)  # its gain is never large enough, or its ramp takes too long
    loop.run(10)
    assert [name for name, _ in branch.path][-2:] == ["CULLED", "DORMANT"] and not branch.alive
    unchanged(loop)
