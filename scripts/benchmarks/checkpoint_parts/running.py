"""What keeping a run safe takes while it runs: a save every 100 steps against none, and a rollback in steps.

Two trainers of one configuration take turns, 100 steps each; one of them saves at the beginning of its turn, so that its thread writes
while the turn goes on. Ratios are of the whole turn; ``stall`` is the share of the turn in which training waited for the copy.
A rollback is the governor's whole recovery: looking for a culprit, and host, optimizer and branches back at the last good snapshot. It is
measured where no branch did it, which the first forward tells, and where one did, which is poisoned, looked for and removed.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch

from esper.checkpoint import disk
from esper.checkpoint.background_saver import Retention, Saver
from esper.checkpoint.disk import Copy
from esper.checkpoint.tree import join, split
from esper.cli.compose import compose
from esper.engine.port import NullPort
from esper.lifecycle import Stage
from esper.messages import Germinate
from esper.running.builders import build_trainer
from esper.seeds import Branch
from esper.tasks.base import Task
from esper.trainer.governor import Anomaly, Governor
from esper.trainer.trainer import Trainer
from scripts.benchmarks.checkpoint_parts.spent import Spent, spent

HOSTS = {
    "mlp": ("model.width=64",),
    "cnn": ("model=cnn", "blueprint=conv"),
    "transformer": ("task=text", "model=transformer", "blueprint=low_rank", "trainer.batch_size=8"),
}
#: The thread that writes takes a few milliseconds whatever the host: turns of the mlp's millisecond steps feel them, and have no limit.
LIMITS = {
    **{f"{name}: saving / none": limit for name, limit in (("mlp", math.nan), ("cnn", 1.01), ("transformer", 1.01))},
    **{f"{name}: stall": 0.01 for name in HOSTS},
    **{f"{name}: rollback / step": 2.0 for name in HOSTS},
    **{f"{name}: rollback with a culprit / step": 2.0 for name in HOSTS},
}
BETWEEN = 100
GROWN = 40
COMMON = (
    "trainer.steps=100000",
    "trainer.validate_every=100%",
    "trainer.governor_failures=1000000",
    "lifecycle.training_min=2step",
    "lifecycle.grafting_max=100%",
    "grafting.ramp=50%",
    "tracking=none",
    "controller=none",
)


class Gardener(NullPort):
    """Lets the first seed of every site germinate at tick 1; the branches are blended in as long as they are looked at."""

    def __init__(self) -> None:
        self.sites: list[str] = []

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """Now the sites are known."""
        self.sites = [site["name"] for site in sites]

    def commands(self, tick: int) -> list[Any]:
        """All at once."""
        return [Germinate(id=site, site=site, seed=0) for site in self.sites] if tick == 1 else []


def grown(words: tuple[str, ...], tasks: dict[str, Task], device: torch.device, state: Any = None) -> Trainer:
    """A trainer with a branch being blended in at every site; with ``state`` as it was in that."""
    config = compose([*COMMON, *words])
    task = tasks.setdefault(config.task.name, config.task.build())
    trainer = build_trainer(config, task, device, Gardener(), state=state)
    trainer.model.train()
    if state is None:
        _advance(trainer, GROWN)
    return trainer


def measure(turns: int, folder: Path, device: torch.device) -> dict[str, list[Spent]]:
    """The ratios of all hosts, one a repetition."""
    found = {}
    for name in HOSTS:
        found[f"{name}: saving / none"], found[f"{name}: stall"] = saving(name, turns, folder, device)
        found[f"{name}: rollback / step"] = rollback(name, turns, device)
        found[f"{name}: rollback with a culprit / step"] = rollback_with_a_culprit(name, turns, device)
    return found


def saving(name: str, turns: int, folder: Path, device: torch.device) -> tuple[list[Spent], list[Spent]]:
    """(turn with a save over turn without, share of a turn that training waited), one a pair of turns."""
    tasks: dict[str, Task] = {}
    saves, rests = grown(HOSTS[name], tasks, device), grown(HOSTS[name], tasks, device)
    saver = Saver(folder / name, Retention())
    ratios, stalls = [], []
    for turn in range(turns + 1):  # the first is for warmth
        if turn % 2:
            rest, save = spent(lambda: _advance(rests, BETWEEN)), spent(lambda: _turn(saves, saver))
        else:
            save, rest = spent(lambda: _turn(saves, saver)), spent(lambda: _advance(rests, BETWEEN))
        saver.wait()
        if turn:
            ratios.append(save.over(rest))
            stalls.append(Spent(saver.stalled_s[-1], saver.stalled_s[-1]).over(rest))
    return ratios, stalls


def rollback(name: str, repeats: int, device: torch.device) -> list[Spent]:
    """Recovery over a step, one a repetition; the branches stay, as none of them did it."""
    trainer = grown(HOSTS[name], {}, device)
    assert trainer.governor is not None and trainer.governor.snapshot is not None
    governor, ratios = trainer.governor, []
    for repeat in range(repeats + 1):
        step = [spent(trainer.advance) for _ in range(5)]
        batch = trainer._batch(trainer.outcome.steps)
        took = spent(lambda batch=batch: governor.recover(Anomaly(trainer.outcome.steps, "measured"), batch))
        if repeat:
            ratios.append(took.over(sorted(step, key=lambda one: one.wall)[len(step) // 2]))
    return ratios


def rollback_with_a_culprit(name: str, repeats: int, device: torch.device) -> list[Spent]:
    """Recovery from a branch that explodes over a step, one a repetition, each on a trainer as it was before: the branch is gone then."""
    tasks: dict[str, Task] = {}
    before, ratios = join(*split(grown(HOSTS[name], tasks, device).state())), []
    for repeat in range(repeats + 1):
        trainer = grown(HOSTS[name], tasks, device, copy.deepcopy(before))
        governor = trainer.governor
        assert governor is not None
        step = [spent(trainer.advance) for _ in range(5)]
        batch = trainer._batch(trainer.outcome.steps)
        culprit = poisoned(trainer, governor, batch, repeat)
        anomaly = Anomaly(trainer.outcome.steps, "measured")
        took = spent(lambda governor=governor, anomaly=anomaly, batch=batch: governor.recover(anomaly, batch))  # type: ignore[misc]
        assert culprit.stage is Stage.ROLLED_BACK and len(anomaly.culprits) == 1, anomaly
        if repeat:
            ratios.append(took.over(sorted(step, key=lambda one: one.wall)[len(step) // 2]))
    return ratios


def poisoned(trainer: Trainer, governor: Governor, batch: Any, number: int) -> Branch:
    """One of the branches that are being blended in, another one for another ``number``, with weights so large that the loss is unusual."""
    branches = trainer.grow.registry.in_stage(Stage.GRAFTING)
    for branch in branches[number % len(branches) :] + branches[: number % len(branches)]:
        bank = trainer.grow.registry.layers[branch.site].bank(branch.blueprint)
        good = {name: stack.detach()[branch.slot].clone() for name, stack in bank.stacks.items()}
        for power in range(2, 30, 2):
            with torch.no_grad():
                for stack in bank.stacks.values():
                    stack[branch.slot] = 10.0**power
            if not governor._usual(governor._loss(batch, [])):
                return branch
        with torch.no_grad():
            for name, stack in bank.stacks.items():
                stack[branch.slot] = good[name]
    raise AssertionError(f"no branch of {trainer.model} can make the loss unusual")


def _advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()


def _turn(trainer: Trainer, saver: Saver) -> None:
    saver.save(lambda: _copy(trainer))
    _advance(trainer, BETWEEN)


def _copy(trainer: Trainer) -> Copy:
    state = {"trainer": trainer.state()}
    return disk.copy(state, trainer.outcome.steps, trainer.grow.tick_number, state["trainer"]["grow"]["topology"], None)
