"""The arms that grow: a smaller host whose seeds germinate, learn, mature, and give way to new ones when they add least.

This is ``esper.attach`` in a loop of one's own. A branch learns from the task as soon as it has germinated (there is no isolation and
no judge: on a stream that never repeats there are no data to keep for judging). It stays in GRAFTING, the stage in which a branch is
blended and learns. The gardener takes the mature branch away that adds least to its site, and germinates in its place at once. It does so
by ROLLED_BACK, since a command to cull is refused before ``grafting_min``, and after it a branch would go on to be frozen and judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from learners import L2Init  # beside this file
from stream import digits
from torch import Tensor
from torch.nn import functional

from esper import attach
from esper.blueprints import Width
from esper.bus.telemetry_codec import unpack
from esper.controllers import command_id
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.grafting import CONFIGS as STRATEGIES
from esper.lifecycle import LifecycleConfig, Stage
from esper.messages import Germinate, Message, RunStarted, Selector, SetStage, Telemetry, Transition
from esper.seeds import TelemetryConfig
from esper.telemetry_columns import Column

DECAY = 0.9  # of the running mean of what a branch adds


class Gardener:
    """Germinates everywhere at first; then, every ``every`` ticks, culls the mature branch that adds least, if ``culls``."""

    def __init__(self, every: int, maturity: int, culls: bool = True) -> None:
        self.every, self.maturity, self.culls = every, maturity, culls
        self.dormant: list[tuple[str, int]] = []
        self.born: dict[tuple[str, int], int] = {}
        self.adds: dict[tuple[str, int], float] = {}

    def observe(self, message: Message) -> None:
        """Which seeds are dormant, and what each branch adds, in parts of its site's activation."""
        if isinstance(message, RunStarted):
            self.dormant = [(site["name"], seed) for site in message.sites for seed in range(site["seeds"])]
        elif isinstance(message, Transition):
            place = (message.site, message.seed)
            if message.target == Stage.DORMANT:
                self.dormant.append(place)
            elif message.target == Stage.GRAFTING:
                self.born[place] = message.tick
                self.adds.pop(place, None)
            elif message.target == Stage.ROLLED_BACK:
                self.born.pop(place, None)
        elif isinstance(message, Telemetry):
            for row in unpack(message)[:, :, Column.BRANCH_RMS_RATIO]:
                for seed in np.flatnonzero(np.isfinite(row)).tolist():
                    place, value = (message.site, seed), float(row[seed])
                    self.adds[place] = DECAY * self.adds.get(place, value) + (1.0 - DECAY) * value

    def decide(self, tick: int) -> list[Any]:
        """Fill what is free; cull when it is time."""
        commands: list[Any] = []
        for site, seed in self.dormant:
            commands.append(Germinate(id=command_id(tick, len(commands)), site=site, seed=seed))
        self.dormant = []
        if self.culls and tick % self.every == 0:
            mature = [place for place, born in self.born.items() if tick - born > self.maturity]
            if mature:
                site, seed = min(mature, key=lambda place: (self.adds.get(place, 0.0), place))
                select = Selector(site=site, seeds=[seed])
                commands.append(SetStage(id=command_id(tick, len(commands)), select=select, target=int(Stage.ROLLED_BACK)))
        return commands

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        marks = [[site, seed, born, self.adds.get((site, seed))] for (site, seed), born in self.born.items()]
        return {"dormant": [list(place) for place in self.dormant], "marks": marks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.dormant = [(site, seed) for site, seed in state["dormant"]]
        self.born = {(site, seed): born for site, seed, born, _ in state["marks"]}
        self.adds = {(site, seed): adds for site, seed, _, adds in state["marks"] if adds is not None}


class Grown(L2Init):
    """A host of ``width`` with one branch of ``units`` hidden units in either hidden layer at a time.

    ``settings``: base, lr, strength (of the pull of the host's own weights towards their initial ones), branch_lr, units, every, maturity,
    culls.
    """

    def __init__(self, settings: Mapping[str, Any], width: int, draws: torch.Generator, steps: int, seed: int) -> None:
        super().__init__(settings, width, draws)
        always = f"{steps + 1}step"
        inputs, labels = digits()
        self.grow = attach(
            self.net,
            total_steps=2 * steps,  # no stage's durations end with the stream
            loss=lambda net, batch: functional.cross_entropy(net(batch[0]), batch[1]),
            optimizer=self.optimizer,
            blueprint=Width(units=settings["units"]),
            grafting=STRATEGIES["linear"](ramp="0step"),
            lifecycle=LifecycleConfig(
                training_min="0step", training_max="1step", readiness=-1.0, germinated_max="2step",
                grafting_min=always, grafting_max=always, stabilization_min="0step", stabilization_max=always,
                evaluating_min="0step", fine_tuning_min="0step", fade="1step", embargo="1step", guard=False,
            ),
            telemetry=TelemetryConfig(every=10),
            learning=BranchLearning(lr=settings["branch_lr"], weight_decay=0.0),
            warmup="0step",
            controller=Gardener(settings["every"], settings["maturity"], settings["culls"]),
            sample=(inputs[:2], labels[:2]),
            seed=seed,
            count_macs=False,
        )  # fmt: skip

    def penalty(self) -> Tensor | float:
        """The pull, on the host alone."""
        return super().penalty() if self.settings["strength"] else 0.0

    def learn(self, inputs: Tensor, labels: Tensor, loss: Tensor) -> None:
        """A step of the host's optimizer and of the branches'."""
        self.grow.after_backward((inputs, labels), loss.detach())
        self.optimizer.step()
        self.grow.tick()

    def counts(self) -> dict[str, int]:
        """Branches that germinated and that were culled."""
        counts = self.grow.transitions.counts
        return {"germinated": counts["germinated"], "culled": counts["rolled_back"]}
