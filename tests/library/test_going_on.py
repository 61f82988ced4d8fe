"""A loop of the user's own that stops and goes on: host and optimizer by torch, everything else by ``grow.state()``."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import batch, build, same, sample_loss, short
from torch import nn

from esper import attach
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.errors import UserError

Parts = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]
STEPS, STOP = 60, 25


def parts(host: str = "batch_norm") -> Parts:
    """A host with dropout and norm statistics, and a rate that falls."""
    model = build(host)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def attached(made: Parts, **settings: Any) -> Grow:
    """Seeds that a heuristic controller wakes in two waves, judged on a fixed batch."""
    given = {"judge": [batch("mlp", 900, 64)], "lifecycle": short(), "sites": ["fc1", "fc2"], "per_site": 2}
    given |= {"controller": CONFIGS["heuristic"](germinate_at="10%", count=1, plateau="20step", embargo="2%", until="80%")}
    return attach(made[0], loss=sample_loss, optimizer=made[1], total_steps=STEPS, **(given | settings))


def train(made: Parts, grow: Grow, first: int, last: int) -> None:
    """The loop, from one step to another."""
    model, optimizer, scheduler = made
    for step in range(first, last):
        loss = sample_loss(model, batch("mlp", step)).mean()
        loss.backward()
        grow.after_backward(batch("mlp", step), loss.detach())
        optimizer.step()
        grow.tick(loss.detach())
        grow.observe({"validation/loss": 1.0})  # stands still, so that the controller starts waves
        scheduler.step()
        optimizer.zero_grad()


def undisturbed(**settings: Any) -> Grow:
    """The run that nothing interrupts."""
    torch.manual_seed(5)
    made = parts()
    grow = attached(made, **settings)
    train(made, grow, 0, STEPS)
    return grow


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_loop_that_stops_and_goes_on_ends_with_the_same_bits(tmp_path: Path, where: str) -> None:
    whole = undisturbed()
    torch.manual_seed(5)
    made = parts()
    grow = attached(made)
    train(made, grow, 0, STOP)
    rest = {"model": grow.host_state(), "optimizer": made[1].state_dict(), "scheduler": made[2].state_dict(), "rng": torch.get_rng_state()}
    torch.save(rest, tmp_path / "rest.pt")
    grow.save_branches(tmp_path / "branches")
    kept: Any = tmp_path / "branches" if where == "disk" else grow.state()
    assert grow.registry.branches.living() and grow.judge is not None and len(grow.judge.recent) == 4
    saved = torch.load(tmp_path / "rest.pt", weights_only=True)
    again = parts()
    for part, name in zip(again, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(saved[name])
    second = attached(again, state=kept)
    torch.set_rng_state(saved["rng"])
    train(again, second, STOP, STEPS)
    same(whole.registry.model.state_dict(), second.registry.model.state_dict())
    assert second.observer.branch_cards() == whole.observer.branch_cards()
    assert second.transitions.counts == whole.transitions.counts and whole.transitions.counts["germinated"] > 1
    assert len(whole.registry.branches.entries) > len(grow.registry.branches.entries)  # the controller's memory was needed
    same(whole.export().state_dict(), second.export().state_dict())


def test_a_rate_set_by_hand_is_followed_from_where_it_began() -> None:
    made = parts("mlp")
    grow = attached(made)
    made[1].param_groups[0]["lr"] = 0.001
    made[1].param_groups[0].pop("initial_lr")
    train((made[0], made[1], torch.optim.lr_scheduler.ConstantLR(made[1], 1.0)), grow, 0, 2)
    assert grow.settings.learning.lr * grow.host_rate.factor() == pytest.approx(0.001)
    again = parts("mlp")
    again[1].param_groups[0]["lr"] = 0.001
    again[1].param_groups[0].pop("initial_lr")
    second = attached(again, state=grow.state())
    assert second.settings.learning.lr == grow.settings.learning.lr
    assert second.settings.learning.lr * second.host_rate.factor() == pytest.approx(0.001)


def test_a_state_that_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    made = parts("mlp")
    grow = attached(made)
    train(made, grow, 0, 3)
    path = grow.save_branches(tmp_path)
    for settings, sentence in (
        ({"per_site": 1}, "it has a site"),
        ({"controller": None}, "no controller was given to go on with it"),
        ({"controller": "random"}, "the memory of another controller"),
    ):
        with pytest.raises(UserError, match=sentence):
            attached(parts("mlp"), state=path, **settings)
    with pytest.raises(UserError, match=r"nothing in .* to go on from"):
        attached(parts("mlp"), state=tmp_path / "elsewhere")


Pair = namedtuple("Pair", "inputs targets")


def test_batches_that_the_judge_remembers_come_back_as_they_were() -> None:
    named = (lambda pair: {"x": pair[0], "y": pair[1]}, True)
    for kind, comes_back in ((tuple, True), (list, True), named, (lambda pair: Pair(*pair), False)):
        made = parts()
        grow = attached(made)
        assert grow.judge is not None
        grow.judge.remember(kind(batch("mlp")))
        second = attached(parts(), state=grow.state())
        assert second.judge is not None
        assert [type(one) for one in second.judge.recent] == ([type(grow.judge.recent[0])] if comes_back else [])
