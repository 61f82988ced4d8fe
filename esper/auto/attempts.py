"""One attempt: a run with the settings that are tried, within the budget that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.auto.config import MACS, Amount
from esper.auto.stopping import Stop
from esper.errors import Pruned, UserError
from esper.report.summary_file import NAME, read_summary
from esper.tasks.base import Task

FINISHED, PRUNED, FAILED, LARGE, DEAR, SPENT = "finished", "ended early", "failed", "too large", "too dear", "budget spent"


@dataclass
class Attempt:
    """What was tried, and what came of it; numbers are NaN where there is none."""

    number: int
    phase: str
    what: str
    parent: int
    folder: str
    state: str = FAILED
    quality: float = math.nan
    loss: float = math.nan
    parameters: float = math.nan  # of the exported model
    fuller: float = 1.0  # these over those that learnt: layers that were widened on both sides have more
    steps: int = 0
    reached: int = 0
    macs: float = 0.0
    seconds: float = 0.0
    spent: float = 0.0
    kept: bool = False
    why: str = ""
    values: dict[str, str] = field(default_factory=dict)
    host: list[str] = field(default_factory=list)

    @property
    def macs_a_step(self) -> float:
        """MACs of a step of a run that goes on from this one's model."""
        return self.fuller * self.macs / max(1, self.steps)


class Purse:
    """What is left of a budget."""

    def __init__(self, amount: Amount) -> None:
        self.amount = amount
        self._macs = 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @property
    def spent(self) -> float:
        """In the budget's own unit."""
        return self._macs if self.amount.unit == MACS else self.seconds

    @property
    def left(self) -> float:
        """In the budget's own unit."""
        return self.amount.value - self.spent

    def pay(self, macs: float) -> None:
        """Count a run's training."""
        self._macs += macs

    def exceeded(self, macs: float) -> bool:
        """Whether a run that has come to so many MACs has used up what was left when it began."""
        return macs > self.left if self.amount.unit == MACS else self.left <= 0


@dataclass(frozen=True)
class Limits:
    """When an attempt ends before its time."""

    purse: Purse
    most_parameters: int = 0
    most_macs: float = math.inf
    stop: Stop = field(default_factory=Stop)
    falls_behind: Callable[[int, float], bool] = lambda step, value: False
    prune_after: float = 0.25


def attempt(one: Attempt, words: Sequence[str], limits: Limits) -> Attempt:
    """Run it. Fills in ``one``.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was spent is counted.
    """
    from esper.cli.compose import compose
    from esper.running.run import run

    began = time.monotonic()
    folder = Path(one.folder)
    watcher = _Watcher(limits)
    try:
        config = compose(words)
        one.steps = config.trainer.steps
        run(config, folder, quiet=True, controls=(), watch=watcher, test=False)
        one.state = FINISHED
    except Pruned:
        one.state, one.why = watcher.state, watcher.why
    except UserError as error:
        one.state, one.why = FAILED, str(error)
    finally:
        one.seconds = time.monotonic() - began
        _take_over(one, folder, watcher)
        limits.purse.pay(one.macs)
        one.spent = limits.purse.spent
    return one


def tested(words: Sequence[str], task: Task, model: Path) -> dict[str, float]:
    """What the model in a folder, of a run with these words, is worth on the test set."""
    from esper.cli.compose import compose
    from esper.export.saved_model import load_weights
    from esper.randomness import generator
    from esper.trainer.device import choose_device, numerics
    from esper.trainer.evaluation import evaluate, held_out

    config = compose(words)
    device = choose_device(config.trainer)
    with numerics(config.trainer):
        host = load_weights(config.model.build(task, generator(0, "host")), str(model))
        return evaluate(host.to(device), task, held_out(task, "test", device))


def chosen_by(trainer: Any) -> dict[str, float]:
    """Loss and metrics over the rows of the validation and judge sets together: nothing is judged here, and few rows choose badly."""
    from esper.trainer.evaluation import evaluate, held_out

    found: dict[str, float] = {}
    sets = {which: len(getattr(trainer.task, which)) for which in ("validation", "judge")}
    for which, count in sets.items():
        for name, value in evaluate(trainer.measured, trainer.task, held_out(trainer.task, which, trainer.device)).items():
            found[name] = found.get(name, 0.0) + value * count / sum(sets.values())
    return found


class _Watcher:
    """Called after every look at the validation set; ends the run where a limit is reached, and measures the model at the end."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.state, self.why, self.macs = FAILED, "", 0.0
        self.values: dict[str, float] = {}
        self.steps, self.size, self.fuller = 0, 0, 1.0

    def __call__(self, trainer: Any) -> None:
        self.limits.stop.check()
        self.macs = float(trainer.grow.meter.total)
        self.steps = steps = trainer.outcome.steps
        total = trainer.total
        limits = self.limits
        if not self.size or steps >= total:
            self.size = sum(parameter.numel() for parameter in trainer.grow.export().parameters())
            self.fuller = self.size / trainer.parameters
        if limits.most_parameters and self.size > limits.most_parameters:
            self._end(LARGE, f"{self.size:,} parameters, and max_parameters={limits.most_parameters:,}")
        if steps >= total:
            self.values = chosen_by(trainer)
            return
        if (expected := self.macs / steps * total) > limits.most_macs:
            self._end(DEAR, f"it would take {expected:.2g} MACs, {expected / limits.most_macs:.1f} times the most it may")
        if limits.purse.exceeded(self.macs):
            self._end(SPENT, "the budget was spent before it had finished")
        name = f"validation/{trainer.task.primary}"
        value = next((value for _, key, value in reversed(trainer.outcome.history) if key == name), math.nan)
        if steps >= limits.prune_after * total and limits.falls_behind(steps, value):
            self._end(PRUNED, f"behind the others after {steps} of {total} steps")

    def _end(self, state: str, why: str) -> None:
        self.state, self.why = state, why
        raise Pruned(why)


def _take_over(one: Attempt, folder: Path, watcher: _Watcher) -> None:
    """The numbers of the run's summary, as far as it has one."""
    if not (folder / NAME).exists():
        one.macs, one.reached = watcher.macs, watcher.steps
        return
    summary = read_summary(folder)
    if watcher.values:
        one.quality, one.loss = watcher.values[str(summary["primary"]).partition("/")[2]], watcher.values["loss"]
    one.macs, one.reached = float(summary.get("macs") or 0.0), int(summary.get("steps") or 0)
    one.parameters, one.fuller = float(watcher.size or math.nan), watcher.fuller
