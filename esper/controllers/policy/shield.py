"""What no network may do, whatever it wants: fixed rules around the policy, and a watch over its predictions."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from esper.controllers.credit import Life
from esper.controllers.view import Seed
from esper.lifecycle.stages import Stage
from esper.messages import Message, Metrics, Transition

LEAST_ERROR = 0.01
"""Error of predicted rewards below which no network is blamed."""


class Shield:
    """Rules over the run's messages alone; each question is answered by the reason why not, empty where there is none.

    ``rise`` is the share by which the validation loss may lie above its best; nothing germinates for ``calm`` ticks after a rollback.
    """

    def __init__(self, loss: str, rise: float) -> None:
        self._names = ("train/loss", loss)
        self._loss, self._rise = loss, rise
        self._last: dict[str, float] = {}
        self._best = math.inf
        self._rolled_back = -1
        self.calm = 0

    def observe(self, message: Message) -> None:
        """Take note of losses and of rollbacks."""
        if isinstance(message, Metrics):
            for name in self._names:
                if name in message.values:
                    self._last[name] = message.values[name]
            if self._loss in message.values and math.isfinite(message.values[self._loss]):
                self._best = min(self._best, message.values[self._loss])
        elif isinstance(message, Transition) and message.target == Stage.ROLLED_BACK:
            self._rolled_back = message.tick

    def against_growth(self, tick: int) -> str:
        """Why nothing may germinate at ``tick``."""
        for name, value in self._last.items():
            if not math.isfinite(value):
                return f"{name} is not finite"
        value = self._last.get(self._loss, self._best)
        if math.isfinite(self._best) and value - self._best > self._rise * abs(self._best):
            return f"{self._loss} has risen to {value:.4g} from {self._best:.4g}"
        if self._rolled_back >= 0 and tick - self._rolled_back <= self.calm:
            return f"a branch was rolled back at tick {self._rolled_back}"
        return ""

    @staticmethod
    def against_stop(life: Life, asked: list[Seed]) -> str:
        """Why this branch may not be stopped; ``asked`` are those that were told to go at this decision."""
        if asked:
            return "one branch is stopped at a time"
        if math.isfinite(life.gain) and life.gain > 0.0:
            return "the judge has found that it gains"
        return ""

    def state(self) -> dict[str, Any]:
        """JSON-able; a number that is not finite stands as None."""
        last = {name: value if math.isfinite(value) else None for name, value in self._last.items()}
        return {"last": last, "best": self._best if math.isfinite(self._best) else None, "rolled_back": self._rolled_back}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._last = {name: math.nan if value is None else float(value) for name, value in state["last"].items()}
        self._best = math.inf if state["best"] is None else float(state["best"])
        self._rolled_back = int(state["rolled_back"])


class Trust:
    """Whether predictions have been off for long: the error of the last ``ends`` beside the one that the network was learnt with.

    The network is blamed when the RMS over the last ``ends`` branches is more than ``tolerance`` times ``error``.
    """

    def __init__(self, error: float, ends: int, tolerance: float) -> None:
        self.limit = tolerance * max(error, LEAST_ERROR)
        self._squares: deque[float] = deque(maxlen=ends)

    def enter(self, predicted: float, reward: float) -> None:
        """One more branch that ended."""
        self._squares.append((predicted - reward) ** 2)

    def lost(self) -> str:
        """Why the network is not to be believed any longer; empty where it is."""
        ends = len(self._squares)
        if ends < (self._squares.maxlen or 1):
            return ""
        error = math.sqrt(sum(self._squares) / ends)
        if error <= self.limit:
            return ""
        return f"its predictions of the last {ends} branches were off by {error:.3g}, and {self.limit:.3g} is the most"

    def state(self) -> list[float]:
        """JSON-able."""
        return list(self._squares)

    def load_state(self, state: list[float]) -> None:
        """Go on from ``state``."""
        self._squares.extend(state)
