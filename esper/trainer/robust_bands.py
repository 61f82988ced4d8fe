"""Robust bands: the usual range of a signal, and whether a new value is far above it."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

WINDOW = 64
WARM = 20
REFRESH = 8
TINY = 1e-12


class Band:
    """Median and median absolute deviation of the logarithms of the last ``WINDOW`` accepted values.

    A value is out of band when its logarithm lies more than ``spreads`` robust standard deviations (1.4826·MAD, Hampel 1974)
    above the median and the value itself more than ``factor`` times it; before ``WARM`` values only non-finite ones are.
    Nothing up to the largest of the first ``WARM`` values is out of band: a host that has learnt its data by heart has losses
    of almost nothing, and a batch with one mistake in it is a hundred times that, but no harm.
    """

    def __init__(self, spreads: float, factor: float) -> None:
        self.spreads, self.factor = spreads, factor
        self.logs: deque[float] = deque(maxlen=WINDOW)
        self.limit = math.inf
        self.start = 0.0
        self._seen = 0
        self._since = 0

    def out(self, value: float) -> bool:
        """Whether this value is not finite or out of band; a sensor that gives nothing finite has failed."""
        return not math.isfinite(value) or value > self.limit

    def accept(self, value: float) -> None:
        """Take in a value that is in band."""
        self.logs.append(math.log(max(abs(value), TINY)))
        self._since += 1
        if self._seen < WARM:
            self._seen += 1
            self.start = max(self.start, abs(value))
        if len(self.logs) >= WARM and (self._since >= REFRESH or math.isinf(self.limit)):
            self._refresh()

    def _refresh(self) -> None:
        self._since = 0
        centre = median(self.logs)
        spread = 1.4826 * median(abs(value - centre) for value in self.logs)
        self.limit = max(self.start, math.exp(min(700.0, centre + max(self.spreads * spread, math.log(self.factor)))))

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"logs": list(self.logs), "limit": self.limit, "start": self.start, "seen": self._seen, "since": self._since}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.logs = deque((float(value) for value in state["logs"]), maxlen=WINDOW)
        self.limit, self.start = float(state["limit"]), float(state["start"])
        self._seen, self._since = int(state["seen"]), int(state["since"])
