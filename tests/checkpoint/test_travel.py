"""Seeds and branches apart from their host: taken along to one of the same topology, refused by any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper import attach
from esper.checkpoint import disk
from esper.engine.grow import Grow
from esper.errors import UserError
from tests.checkpoint.conftest import Make, train_until


def test_branches_travel_to_a_host_of_the_same_topology(make: Make, tmp_path: Path) -> None:
    first, second = make(), make("seed=7")
    train_until(first, 30)
    path = first.grow.save_branches(tmp_path)
    before = [p.detach().clone() for p in second.optimizer.param_groups[0]["params"]]
    second.grow.load_branches(path)
    assert second.grow.observer.branch_cards() == first.grow.observer.branch_cards()
    assert second.grow.tick_number == 30
    for was, now in zip(before, second.optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(was, now)
    for site, layer in enumerate(first.grow.registry.layers):
        for name, bank in first.grow.registry.banks(site).items():
            other = second.grow.registry.layers[site].bank(name)
            assert layer.name == second.grow.registry.layers[site].name
            assert all(torch.equal(bank.stacks[key], other.stacks[key]) for key in bank.stacks)
    second.model.train()
    second.advance()
    assert torch.isfinite(second.grow.export()(second.validation.batch(0, 0)[0])).all()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("model.width=8",), "the host's 'fc1.bias' is float32"),
        (("sites.per_site=3",), "it has a site"),
        (("sites.match=[fc1]",), "sites and this run"),
        (("lifecycle.objective=reconstruction",), "its silent is True and this run's False"),
    ],
)
def test_another_topology_is_refused_before_anything_is_loaded(make: Make, tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    path = make().grow.save_branches(tmp_path)
    other = make(*words)
    with pytest.raises(UserError, match="does not fit this run") as refusal:
        other.grow.load_branches(path)
    assert reason in str(refusal.value) or ("site" in reason and "site" in str(refusal.value))
    assert other.grow.tick_number == 0


def grown(activation: type[nn.Module], **changes: Any) -> Grow:
    """Seeds on a plain host of the user's own."""
    host = nn.Sequential(nn.Linear(8, 6), activation(), nn.Linear(6, 2))
    batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))
    optimizer = torch.optim.AdamW(host.parameters())
    return attach(host, total_steps=20, loss=loss, optimizer=optimizer, judge=[batch], **changes)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of every sample."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_host_of_other_modules_is_refused_though_every_shape_is_the_same(tmp_path: Path) -> None:
    path = grown(nn.ReLU).save_branches(tmp_path)
    grown(nn.ReLU).load_branches(path)
    other = grown(nn.Tanh)
    with pytest.raises(UserError, match="the host's module '1' is ReLU there and Tanh here"):
        other.load_branches(path)
    older = disk.read(path)[1]
    del older["grow"]["topology"]["modules"]  # schema 4 named none
    other.load_branches(older)


def test_a_whole_runs_checkpoint_is_refused_where_branches_are_asked_for(make: Make, tmp_path: Path) -> None:
    state = {"trainer": train_until(make(), 3)}
    path = disk.write(disk.copy(state, 3, 3, {}, None), tmp_path).path
    for given in (path, tmp_path, state):
        with pytest.raises(UserError, match="is a whole run's checkpoint, which esper resume= and fork= go on from"):
            grown(nn.ReLU).load_branches(given)
        with pytest.raises(UserError, match="is a whole run's checkpoint"):
            grown(nn.ReLU, state=given)
    with pytest.raises(UserError, match="does not hold seeds and branches"):
        grown(nn.ReLU).load_branches({"something": 1})
