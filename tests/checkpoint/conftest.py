"""Short runs of the real trainer, and how two of them compare."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import pytest
import torch

from esper.checkpoint.tree import join, split
from esper.cli.compose import compose
from esper.config import RootConfig
from esper.engine.port import NullPort
from esper.messages import Germinate, Message
from esper.running.builders import build_trainer
from esper.tasks.base import Task
from esper.trainer.evaluation import fingerprint
from esper.trainer.trainer import Trainer

Make = Callable[..., Trainer]
SHORT = (
    "trainer.steps=60",
    "trainer.validate_every=25%",
    "telemetry.every=5",
    "controller=none",
    "tracking=none",
    "lifecycle.training_min=3step",
    "lifecycle.judge_every=5step",
    "lifecycle.fine_tuning_min=4step",
    "grafting.ramp=6step",
)


Event = TypeVar("Event", bound=Message)


class Scripted:
    """A port that germinates two seeds of every site at tick 8, and hears everything."""

    slot = NullPort.slot

    def __init__(self) -> None:
        self.plan: dict[int, list[Any]] = {}
        self.heard: list[tuple[Any, ...]] = []

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """Now the sites are known."""
        places = [(site["name"], seed) for site in sites for seed in range(min(2, site["seeds"]))]
        self.plan = {8: [Germinate(id=f"{site}-{seed}", site=site, seed=seed) for site, seed in places]}

    def __getattr__(self, name: str) -> Callable[..., None]:
        def say(*words: Any) -> None:
            self.heard.append((name, *[word.tolist() if isinstance(word, torch.Tensor) else word for word in words]))

        return say

    def events(self, kind: type[Event]) -> list[Event]:
        """Everything of a kind that the engine said happened."""
        return [words[0] for name, *words in self.heard if name == "emit" and isinstance(words[0], kind)]

    def commands(self, tick: int) -> list[Any]:
        """What was planned for this tick."""
        return self.plan.get(tick, [])


@pytest.fixture
def make() -> Make:
    """Builds a trainer from overrides; two seeds of every site are asked to germinate early."""
    return build


def build(*words: str, state: Any = None) -> Trainer:
    """A trainer on the CPU, from its beginning or from a state."""
    config, task = composed(words)
    return build_trainer(config, task, torch.device("cpu"), Scripted(), state=state)


@lru_cache
def composed(words: tuple[str, ...]) -> tuple[RootConfig, Task]:
    """Config and data of a short run."""
    config = compose([*SHORT, *words])
    return config, config.task.build()


def train_until(trainer: Trainer, step: int) -> Any:
    """The state after ``step`` steps, as it comes back from a checkpoint."""
    trainer.model.train()
    while trainer.outcome.steps < step:
        trainer.advance()
    return join(*split(trainer.state()))


def bits(trainer: Trainer) -> tuple[str, list[tuple[str, list[tuple[str, int]]]]]:
    """Fingerprint of weights and history, and every branch's path."""
    grown = trainer.grow.export().state_dict()
    paths = [(branch.blueprint, branch.path) for branch in trainer.grow.registry.branches.entries]
    return fingerprint(grown, trainer.outcome.history), paths
