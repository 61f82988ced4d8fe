"""Blueprints that mean harm, and a port that commands at random."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.blueprints.base import Blueprint, Parameters
from esper.blueprints.conv import Conv
from esper.blueprints.mlp import MLP
from esper.engine.port import NullPort
from esper.grafting import STRATEGY_NAMES
from esper.messages import (
    Cancel,
    ChangeStrategy,
    Command,
    Germinate,
    Message,
    PauseGrafting,
    ResumeGrafting,
    Selector,
    SetStage,
    Transition,
)


class ReversedGradient(torch.autograd.Function):
    """The identity with its gradient reversed: a parameter that learns through it learns to raise the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@dataclass
class Hostile(Blueprint):
    """A branch that does ``kind``: good, nan, huge, noise, slow or adversarial; ``draws`` is the seed of what it draws."""

    kind: str = "good"
    draws: int = 0

    def __post_init__(self) -> None:
        """The generator is no setting: a model is saved with its blueprint's settings, and no file could hold one."""
        self.lot = torch.Generator().manual_seed(self.draws)

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """The output of the blueprint that is spoiled."""
        if self.kind == "adversarial":
            parameters = {name: ReversedGradient.apply(value) for name, value in parameters.items()}
        delta: Tensor = super().forward(parameters, x)
        if self.kind == "nan" and float(torch.rand((), generator=self.lot)) < 0.05:
            return delta + float("nan")
        if self.kind == "huge":
            return delta + 10.0 ** float(torch.empty(()).uniform_(-1, 30, generator=self.lot))
        if self.kind == "noise":
            return delta + torch.randn(delta.shape, generator=self.lot)
        if self.kind == "slow":
            time.sleep(0.0005)
        return delta


@dataclass
class HostileMLP(Hostile, MLP):
    """At the sites of perceptrons."""

    name: str = "mlp"


@dataclass
class HostileConv(Hostile, Conv):
    """At the sites of convolutions."""

    name: str = "conv"


KINDS = ("good", "nan", "huge", "noise", "slow", "adversarial")


class RandomPort(NullPort):
    """Commands drawn by lot at every tick: germinations until half of the run, everything else to its end."""

    def __init__(self, seed: int, ticks: int) -> None:
        self.lot = random.Random(seed)
        self.ticks = ticks
        self.sites: list[dict[str, Any]] = []
        self.said: dict[str, int] = {}
        self.number = 0

    def started(self, *words: Any) -> None:
        """Which seeds there are."""
        self.sites = words[2]

    def emit(self, event: Message) -> None:
        """Count the branches that went because they harmed slowly."""
        if isinstance(event, Transition) and event.cause.startswith("slow harm"):
            self.said["slow_harm"] = self.said.get("slow_harm", 0) + 1

    def alert(self, *words: Any) -> None:
        """Count what the governor and the engine complain of."""
        self.said[words[2]] = self.said.get(words[2], 0) + 1

    def commands(self, tick: int) -> list[Command]:
        """At most one command a tick, to one seed."""
        site = self.lot.choice(self.sites)
        seed, strategy = self.lot.randrange(site["seeds"]), self.lot.choice(STRATEGY_NAMES)
        self.number += 1
        id, one = f"c{self.number}", Selector(site=site["name"], seeds=[seed])
        if self.lot.random() < 0.1 and tick < self.ticks // 2:
            return [Germinate(id=id, site=site["name"], seed=seed, strategy=strategy)]
        if self.lot.random() < 0.2:
            return [
                self.lot.choice(
                    [
                        SetStage(id=id, select=one, target=self.lot.randrange(11)),
                        ChangeStrategy(id=id, select=one, strategy=strategy),
                        PauseGrafting(id=id, select=one),
                        ResumeGrafting(id=id, select=one),
                        Cancel(id=id, select=one) if self.lot.random() < 0.2 else ResumeGrafting(id=id, select=one),
                    ]
                )
            ]
        return []
