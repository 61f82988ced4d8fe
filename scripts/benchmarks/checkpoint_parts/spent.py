"""What a piece of work takes: seconds on the wall, and of processor time, which other programs on the machine change little."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spent:
    """Seconds on the wall and of this process's processor time."""

    wall: float
    cpu: float

    def over(self, other: Spent) -> Spent:
        """The ratios to another piece of work."""
        return Spent(self.wall / other.wall, self.cpu / other.cpu)


def spent(work: Callable[[], object]) -> Spent:
    """Do it once, and wait for a GPU that is in use; what it returns is dropped after the clock has stopped."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    _wait()
    taken = Spent(time.perf_counter() - wall, time.process_time() - cpu)
    del made
    return taken


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
