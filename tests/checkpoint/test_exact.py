"""Whatever is taken between two steps and taken over by a fresh trainer leads to the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from esper.errors import UserError
from esper.messages import Alert
from esper.trainer.trainer import Trainer
from tests.checkpoint.conftest import Make, bits, train_until

pytestmark = pytest.mark.usefixtures("whole_runs")

SMALL_TEXT = ("task=text", "task.context=16", "task.held_out=0.005", "trainer.batch_size=4", "trainer.validate_every=100%")
TRANSFORMER = (*SMALL_TEXT, "model=transformer", "model.width=16", "model.depth=2", "model.dropout=0.1")
# fmt: off
RUNS = {
    "mlp": (),
    "drift": ("grafting=drift",),
    "momentum, sgd": ("grafting=momentum", "optimizer=sgd"),
    "adaptive, functional gradient": ("grafting=adaptive", "lifecycle.objective=functional_gradient"),
    "performance, low rank": ("grafting=performance", "blueprint=low_rank"),
    "stability, accumulation": ("grafting=stability", "trainer.accumulate=2"),
    "reconstruction, glu": ("lifecycle.objective=reconstruction", "blueprint=glu"),
    "batch norm": ("model=cnn", "blueprint=conv", "sites.per_site=2", "trainer.batch_size=16"),
    "transformer": (*TRANSFORMER, "blueprint=low_rank", "sites.per_site=2"),
    "muon, decaying": (*TRANSFORMER, "blueprint=low_rank", "sites.per_site=2", "optimizer=muon", "scheduler=warmup_stable_decay"),
    "muon, filters and blocks": ("model=cnn", "blueprint=block", "sites.per_site=1", "trainer.batch_size=16", "optimizer=muon"),
    "transformer, blocks": (*TRANSFORMER, "blueprint=block", "sites.per_site=1"),
    "a stack, moments copied": (
        *TRANSFORMER, "blueprint=block", "blueprint.start=copy", "blueprint.source=stack", "blueprint.blocks=3", "blueprint.state=copied",
        "sites.match=[blocks.1]", "sites.per_site=1", "lifecycle=direct", "grafting.ramp=0step",
    ),
    "shared, then untied": (
        *TRANSFORMER, "blueprint=block", "blueprint.start=shared", "blueprint.untie=12step", "sites.per_site=1", "lifecycle=direct",
        "grafting.ramp=0step", "trainer.ema=0.9",
    ),
    "wider": ("model.activation=tanh", "blueprint=width", "blueprint.start=gradmax", "blueprint.units=4", "trainer.ema=0.9"),
    "more heads": (*TRANSFORMER, "blueprint=heads", "trainer.ema=0.9"),
    "wider channels": ("model=cnn", "blueprint=width", "blueprint.units=16", "trainer.batch_size=16"),
    "wider, muon": (*TRANSFORMER, "blueprint=width", "blueprint.start=tiny", "optimizer=muon", "lifecycle=direct", "grafting.ramp=0step"),
    "blocks, dropout": ("model=cnn", "blueprint=block", "sites.per_site=1", "trainer.batch_size=16"),
}
# fmt: on


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS.keys())
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_bits(make: Make, words: tuple[str, ...]) -> None:
    undisturbed = make(*words)
    undisturbed.fit()
    first = make(*words)
    states = [train_until(first, step) for step in (14, 33)]
    for state in states:
        second = make(*words, state=state)
        second.fit()
        assert bits(second) == bits(undisturbed)
        assert second.outcome == undisturbed.outcome
        assert second.grow.meter.spent == undisturbed.grow.meter.spent
        assert repr(second.grow.observer.branch_cards()) == repr(undisturbed.grow.observer.branch_cards())  # a NaN gain too


def test_an_alert_that_is_given_once_a_run_is_not_given_again_after_a_resume(make: Make) -> None:
    def spoiled(state: Any = None) -> Trainer:
        trainer = make(state=state)
        assert trainer.grow.judge is not None
        trainer.grow.judge.data = [(inputs * math.nan, targets) for inputs, targets in trainer.grow.judge.data]
        whole = trainer.validation.batch
        trainer.validation.batch = lambda epoch, position: (whole(epoch, position)[0] * math.nan, whole(epoch, position)[1])
        return trainer

    first = spoiled()
    state = train_until(first, 40)
    assert sorted(codes(first)) == ["judge_not_finite", "validation_not_finite"]
    second = spoiled(state)
    second.fit()
    assert codes(second) == []


def codes(trainer: Trainer) -> list[str]:
    """The codes of the alerts that were given."""
    return [event.code for event in trainer.port.events(Alert)]


def test_a_run_over_a_stream_goes_on_with_the_same_bits_and_fresh_data_have_an_end(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(f"{number} times {line} is {number * line}\n" for line in range(40)))
    words = ("task=text", f"task.path={folder}", f"task.cache={tmp_path}/cache", "task.context=16", "task.held_out=0.05", "task.passes=1")
    words += ("model=transformer", "model.width=16", "model.depth=1", "trainer.batch_size=4")
    undisturbed = make(*words)
    undisturbed.fit()
    second = make(*words, state=train_until(make(*words), 33))
    second.fit()
    assert bits(second) == bits(undisturbed)
    with pytest.raises(UserError, match=r"^60 steps of 32 samples are .* passes over the \d+ training samples, and task\.passes=1 allows"):
        make(*words, "trainer.batch_size=32")
    make(*words, "trainer.batch_size=32", "trainer.steps=30")
