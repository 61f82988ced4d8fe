"""The story of a small run as messages, and feeds that tell it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from esper.lifecycle.stages import Stage
from esper.messages import Alert, GateResult, Message, Metrics, RunEnded, RunStarted, Telemetry, TickEnded, Transition
from esper.telemetry_columns import COLUMNS, Column


def telemetry(tick: int, stages: Sequence[Stage], alpha: float = 0.5) -> Telemetry:
    """One row of site fc1."""
    values = np.full((1, len(stages), len(COLUMNS)), np.nan, "<f4")
    values[0, :, Column.STAGE], values[0, :, Column.ALPHA], values[0, :, Column.AGE] = stages, alpha, 3
    return Telemetry(site="fc1", ticks=[tick], seeds=len(stages), columns=list(COLUMNS), data=values.tobytes())


def moved(tick: int, seed: int, source: Stage, target: Stage) -> Transition:
    """A transition at fc1."""
    where = {"site": "fc1", "seed": seed, "branch": 0, "blueprint": "mlp", "strategy": "linear"}
    return Transition(tick=tick, source=int(source), target=int(target), cause="gate passed", **where)


def story() -> list[Message]:
    """Ten of twenty ticks: one seed of two grafts, a gate was asked twice, an alert."""
    messages: list[Message] = [RunStarted(tick=0, total_ticks=20, sites=[{"name": "fc1", "seeds": 2}])]
    for tick in range(1, 11):
        messages.append(Metrics(tick=tick, values={"train/loss": 1.0 / tick, "cost/steps": float(tick), "cost/seconds": tick / 10}))
        messages.append(TickEnded(tick=tick))
    messages += [
        moved(3, 1, Stage.DORMANT, Stage.GERMINATED),
        moved(4, 1, Stage.GERMINATED, Stage.TRAINING),
        GateResult(tick=5, site="fc1", seed=1, branch=0, gate="readiness", value=-1.0, threshold=0.0, passed=False),
        GateResult(tick=6, site="fc1", seed=1, branch=0, gate="readiness", value=0.5, threshold=0.0, passed=True),
        moved(6, 1, Stage.TRAINING, Stage.GRAFTING),
        Metrics(tick=10, values={"validation/accuracy": 0.75}),
        Alert(tick=7, level="warning", code="slow", text="the disk is <b>slow</b>"),
        telemetry(10, [Stage.DORMANT, Stage.GRAFTING]),
    ]
    return sorted(messages, key=lambda message: getattr(message, "tick", 10))


class Told:
    """A feed that has its messages already; they come a part a look."""

    place, problem = "here", ""

    def __init__(self, *parts: Sequence[Message]) -> None:
        self.parts = [list(part) for part in parts]

    def poll(self) -> list[Message]:
        """The next part."""
        return self.parts.pop(0) if self.parts else []


@pytest.fixture
def ended() -> list[Message]:
    """The story to its end."""
    return [*story(), RunEnded(tick=20, status="FINISHED", summary={})]
