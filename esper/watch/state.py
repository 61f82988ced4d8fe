"""What is known of a run that is watched, gathered from its messages, as plain values that a page draws."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.messages import Alert, GateResult, Message, Metrics, RunEnded, RunStarted, Telemetry, Transition
from esper.tracking.progress_bar import ProgressState
from esper.tracking.tracker import rows

POINTS = 200  # of a curve; twice as many are thinned out
LATEST = 200  # transitions and alerts that are kept
MOST_SEEDS = 200
RESTING = (Stage.DORMANT,)
SHOWN = ("alpha", "gain", "age")  # columns of the telemetry


@dataclass
class _Gate:
    """How often a gate was asked and passed, and its last and its nearest value."""

    asked: int = 0
    passed: int = 0
    value: float = math.nan
    threshold: float = math.nan
    closest: float = math.nan

    def take(self, answer: GateResult) -> None:
        self.asked += 1
        self.passed += answer.passed
        self.value, self.threshold = answer.value, answer.threshold
        nearer = not abs(self.closest - self.threshold) <= abs(answer.value - self.threshold)
        self.closest = answer.value if nearer and math.isfinite(answer.value) else self.closest


class RunState:
    """One run; ``take`` learns from its messages, ``snapshot`` tells what is known."""

    def __init__(self, name: str, primary: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.status = name, ""
        self.progress = ProgressState(primary, clock)
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.seeds: dict[tuple[str, int], dict[str, Any]] = {}
        self.gates: dict[str, _Gate] = {}
        self.transitions: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self.alerts: deque[dict[str, Any]] = deque(maxlen=LATEST)
        self._marked = -1

    def take(self, messages: Sequence[Message]) -> None:
        """Learn from messages, and note the time for the speed if the run has gone on."""
        for message in messages:
            self.progress.take(message)
            match message:
                case RunStarted():
                    self.status = "RUNNING"
                case RunEnded():
                    self.status = message.status
                    self.progress.tick = max(self.progress.tick, message.tick)
                case Metrics():
                    self._metrics(message)
                case Telemetry() if message.ticks:
                    self._telemetry(message)
                case Transition():
                    self._transition(message)
                case GateResult():
                    self.gates.setdefault(message.gate, _Gate()).take(message)
                case Alert():
                    said = {"tick": message.tick, "level": message.level, "text": message.text, "site": message.site, "seed": message.seed}
                    if said not in self.alerts:  # a resumed run says again what came after its checkpoint
                        self.alerts.append(said)
        if self.progress.tick != self._marked:
            self._marked = self.progress.tick
            self.progress.mark()

    def _metrics(self, message: Metrics) -> None:
        self.progress.tick = max(self.progress.tick, message.tick)
        for name, value in message.values.items():
            if name == "train/loss" or name.startswith("validation/"):
                curve = self.curves.setdefault(name, [])
                while curve and curve[-1][0] >= message.tick:  # the run went back to a checkpoint
                    curve.pop()
                curve.append((message.tick, value))
                if len(curve) > 2 * POINTS:
                    del curve[1:-1:2]

    def _telemetry(self, message: Telemetry) -> None:
        self.progress.tick = max(self.progress.tick, message.ticks[-1])
        last = rows(message)[-1]
        column = {name: last[:, at] for at, name in enumerate(message.columns)}
        awake = ~np.isin(column["stage"].astype(np.int64), [int(stage) for stage in RESTING])
        for seed in range(message.seeds):
            where = (message.site, seed)
            if awake[seed]:
                known = self.seeds.setdefault(where, _seed(message.site, seed))
                known["stage"] = Stage(int(column["stage"][seed])).name
                known |= {name: float(column[name][seed]) for name in SHOWN if name in column}
            else:
                self.seeds.pop(where, None)

    def _transition(self, message: Transition) -> None:
        where = (message.site, message.seed if message.seed >= 0 else -2 - message.branch)
        stage = Stage(message.target)
        if stage in RESTING:
            self.seeds.pop(where, None)
        else:
            known = self.seeds.setdefault(where, _seed(message.site, message.seed))
            known |= {"stage": stage.name, "blueprint": message.blueprint or known["blueprint"], "age": 0.0}
        told = {"tick": message.tick, "site": message.site, "seed": message.seed, "cause": message.cause}
        self.transitions.append(told | {"source": Stage(message.source).name, "target": stage.name})

    def snapshot(self) -> dict[str, Any]:
        """Everything as JSON knows it: numbers that are not finite are None, seeds that rest are only counted."""
        progress = self.progress
        score, value = progress.score
        speed, left = progress.steps_per_second, progress.left_s
        if speed is None and progress.values.get("cost/seconds"):  # just begun to watch: the mean so far
            speed = progress.steps / progress.values["cost/seconds"]
            left = (progress.total - progress.tick) / progress.tick * progress.values["cost/seconds"] if progress.tick else None
        seeds = sorted(self.seeds.values(), key=lambda one: (-Stage[one["stage"]], one["site"], one["seed"]))
        tree = {
            "name": self.name,
            "status": self.status,
            "tick": progress.tick,
            "total": progress.total,
            "steps_per_second": speed,
            "left_s": 0.0 if self.status not in ("RUNNING", "") else left if progress.total else None,
            "loss": progress.values.get("train/loss"),
            "metric": f"validation {score}" if score != "validation" else score,
            "value": value,
            "overhead": progress.overhead,
            "stages": progress.stages,
            "seeds": seeds[:MOST_SEEDS],
            "more_seeds": max(0, len(seeds) - MOST_SEEDS),
            "gates": [{"gate": name, **vars(gate)} for name, gate in self.gates.items()],
            "transitions": list(self.transitions)[::-1],
            "alerts": list(self.alerts)[::-1],
            "curves": self.curves,
        }
        plain: dict[str, Any] = _finite(tree)
        return plain


def _seed(site: str, seed: int) -> dict[str, Any]:
    return {"site": site, "seed": seed, "stage": "", "blueprint": "", "alpha": math.nan, "gain": math.nan, "age": math.nan}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
