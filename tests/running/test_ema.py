"""``trainer.ema``, and hosts that draw: what a run measures and keeps, and that a killed one goes on with the same bits."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from growing import Notebook, germinate, same

from esper.checkpoint.tree import join, split
from esper.cli.compose import compose
from esper.running import builders as parts
from esper.running.builders import build_trainer
from esper.trainer.trainer import Trainer

WORDS = ["trainer.steps=60", "controller=none", "sites.match=[fc1]", "sites.per_site=2", "lifecycle.readiness=-1", "lifecycle.stability=0"]
WORDS += ["trainer.validate_every=20step", "lifecycle.training_min=2step", "lifecycle.evaluating_min=2step"]


def built(*words: str, state: Any = None) -> Trainer:
    config = compose([*WORDS, *words])
    return build_trainer(config, config.task.build(), torch.device("cpu"), port=Notebook({2: [germinate("fc1")]}), state=state)


def grow_one(trainer: Trainer, steps: int) -> None:
    """Steps after the second of which a seed germinates."""
    trainer.model.train()
    for _ in range(steps):
        trainer.advance()


def test_the_average_is_what_is_measured_and_exported() -> None:
    plain, averaged = built("trainer.ema=0.0"), built("trainer.ema=0.9")
    for trainer in (plain, averaged):
        grow_one(trainer, 60)
    same(dict(plain.model.state_dict()), dict(averaged.model.state_dict()))  # training itself knows nothing of it
    assert averaged.average is not None and int(averaged.average.n_averaged) == 60
    values = [trainer.outcome.history[-1] for trainer in (plain, averaged)]
    losses = [[value for _, name, value in t.outcome.history if name == "validation/loss"] for t in (plain, averaged)]
    assert losses[0] != losses[1] and values[0] == values[1]
    batch = averaged.validation.at(0)
    averaged.average.eval()
    with torch.no_grad():
        expected = averaged.average(batch[0])
        exported = averaged.grow.export().eval()(batch[0])
        live = averaged.model.eval()(batch[0])
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(exported, live, atol=1e-4)


@pytest.mark.parametrize("stop", [1, 30])
def test_a_run_that_goes_on_has_the_same_average(stop: int) -> None:
    whole = built("trainer.ema=0.9")
    grow_one(whole, stop)
    state = dict(join(*split(whole.state())))
    grow_one(whole, 20)
    again = built("trainer.ema=0.9", state=state)
    grow_one(again, 20)
    assert whole.average is not None and again.average is not None
    assert whole.grow.registry.branches[0].path == again.grow.registry.branches[0].path
    for one, other in zip(whole.average.parameters(), again.average.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.average.buffers(), again.average.buffers(), strict=True):
        assert torch.equal(one, other)


class Drawing(torch.nn.Module):
    """A host that draws from Python's and NumPy's generators too, as one with stochastic depth may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = torch.nn.Linear(64, 8), torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc1(x.flatten(1)))) * (1.0 + random.random() * float(numpy.random.rand()))


def test_a_run_repeats_and_goes_on_with_a_host_that_draws_from_other_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "build_host", lambda *_: Drawing().apply(lambda m: [p.data.fill_(0.01) for p in m.parameters()]))
    whole = built()
    grow_one(whole, 10)
    state = dict(join(*split(whole.state())))
    grow_one(whole, 10)
    random.random(), numpy.random.rand()
    again = built(state=state)
    grow_one(again, 10)
    same(dict(whole.model.state_dict()), dict(again.model.state_dict()))
    random.random(), numpy.random.rand()
    repeated = built()
    grow_one(repeated, 20)
    same(dict(whole.model.state_dict()), dict(repeated.model.state_dict()))
