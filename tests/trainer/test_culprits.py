"""Looking for the branches that did it takes few forwards, and finds them and no others."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
import torch

from esper.lifecycle import Stage
from esper.messages import Germinate
from esper.trainer.governor import Governor, fewest
from tests.checkpoint.conftest import Make


class Counted:
    """Whether the loss is usual without some of them: where all of one of the ``sets`` are off."""

    def __init__(self, *sets: Collection[int]) -> None:
        self.sets = [set(one) for one in sets]
        self.asked = 0

    def __call__(self, off: Collection[int]) -> bool:
        self.asked += 1
        return any(one <= set(off) for one in self.sets)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
def test_one_culprit_is_found_in_two_forwards_for_each_halving(count: int) -> None:
    for culprit in range(count):
        usual = Counted({culprit})
        assert fewest(list(range(count)), usual) == [culprit]
        assert usual.asked <= 2 * (count - 1).bit_length(), (culprit, usual.asked)


def test_one_culprit_among_64_takes_at_most_twelve_forwards() -> None:
    def asked(culprit: int) -> int:
        usual = Counted({culprit})
        fewest(list(range(64)), usual)
        return usual.asked

    assert max(map(asked, range(64))) == 12


@pytest.mark.parametrize("culprits", [{0, 1}, {0, 63}, {5, 6, 40}, {1, 2, 3, 4, 5, 6, 7}, set(range(64))])
def test_several_that_it_takes_together_are_all_found_and_nobody_else(culprits: set[int]) -> None:
    usual = Counted(culprits)
    assert set(fewest(list(range(64)), usual)) == culprits
    assert usual.asked <= min(12 * len(culprits), 2 * 64), usual.asked


def test_where_any_of_several_is_enough_the_first_is_named_always_the_same() -> None:
    for _ in range(3):
        assert fewest([9, 4, 7, 1], Counted({1}, {7}, {4})) == [4]


def counting(governor: Governor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches were off in each of the governor's forwards."""
    asked: list[int] = []
    original: Callable[..., float] = governor._loss
    monkeypatch.setattr(governor, "_loss", lambda batch, without: (asked.append(len(list(without))), original(batch, without))[1])
    return asked


@pytest.mark.parametrize("place", [0, 31, 63])
def test_the_governor_finds_one_branch_among_64_in_few_forwards(make: Make, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    words = ("model.width=64", "sites.match=[fc1,fc2]", "sites.per_site=32", "trainer.steps=80", "grafting.ramp=30step")
    trainer = make(*words, "lifecycle.grafting_max=90%", "lifecycle.training_slots=64", "lifecycle.readiness=-1.0")
    names = [site.name for site in trainer.grow.registry.sites]
    trainer.port.plan = {8: [Germinate(id=f"{name}-{seed}", site=name, seed=seed) for name in names for seed in range(32)]}
    trainer.model.train()
    for _ in range(24):
        trainer.advance()
    grafting = trainer.grow.registry.in_stage(Stage.GRAFTING)
    assert len(grafting) == 64 and trainer.governor is not None
    culprit = grafting[place]
    bank = trainer.grow.registry.layers[culprit.site].bank(culprit.blueprint)
    with torch.no_grad():
        bank.stacks["b2"][culprit.slot] = 1e30
    asked = counting(trainer.governor, monkeypatch)
    trainer.advance()
    assert [branch for branch in grafting if branch.stage is Stage.ROLLED_BACK] == [culprit]
    assert len(asked) <= 2 + 12
