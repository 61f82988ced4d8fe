"""When a metric has stopped getting better."""

from __future__ import annotations

import math
from typing import Any


class Plateau:
    """The best value so far and the tick since which nothing better came.

    Better means: by more than ``min_improvement`` as a share of the best value's size. A value that is not finite is no
    measurement.
    """

    def __init__(self, direction: str, min_improvement: float) -> None:
        assert direction in ("min", "max"), direction
        self._sign = 1.0 if direction == "max" else -1.0
        self._min_improvement = min_improvement
        self.best: float | None = None
        self.since = 0

    def observe(self, tick: int, value: float) -> None:
        """A measurement."""
        if not math.isfinite(value):
            return
        least = -math.inf if self.best is None else self._sign * self.best + self._min_improvement * abs(self.best)
        if self._sign * value > least:
            self.best, self.since = value, tick

    def lasts(self, tick: int) -> int:
        """Ticks without improvement; 0 before the first measurement."""
        return tick - self.since if self.best is not None else 0

    def restart(self, tick: int) -> None:
        """Count anew from ``tick``: something was done about it."""
        self.since = tick

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"best": self.best, "since": self.since}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.best, self.since = state["best"], state["since"]
