"""Where the seconds of a run go: shares of named activities, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by name since it was made; ``total`` is all of them."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def go_on(self, seconds: dict[str, float]) -> None:
        """Count on from what an earlier life of the run measured, ``total`` among it."""
        self.seconds = {name: float(value) for name, value in seconds.items() if name != "total"}
        self._began = time.perf_counter() - float(seconds["total"])

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add what happens inside to ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
