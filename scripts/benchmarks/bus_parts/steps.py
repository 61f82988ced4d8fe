"""What the bus costs inside a training step: the publish call, and the step while the server is frozen."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from bus_parts.rows import NAMES

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig
from esper.bus.port import BusPort


def training_step(width: int = 1024, batch: int = 256) -> Callable[[], None]:
    """A real step: MLP 784–width–width–10 with AdamW, on fixed data."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()),
        torch.nn.Linear(width, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    inputs, targets = torch.randn(batch, 784), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


class Stepping:
    """A training loop that publishes 1,000 × 12 telemetry every step over an embedded server."""

    def __init__(self, rows: np.ndarray, folder: str) -> None:
        self.bus = open_bus(EmbeddedConfig(), folder)
        self.port = BusPort(self.bus, "bench", NAMES)
        self.port.started(0, 1, [])
        self._rows = torch.from_numpy(rows)
        self._step = training_step()
        self._tick = 0
        self.publish: list[float] = []

    def once(self) -> float:
        """One step; its seconds."""
        began = time.perf_counter()
        self._step()
        rows = self._rows[self._tick % len(self._rows)].clone()  # in a run, too, they have just been computed
        before = time.perf_counter()
        self.port.telemetry(self._tick, "site", rows)
        after = time.perf_counter()
        self.port.end_tick(self._tick)
        self._tick += 1
        self.publish.append(after - before)
        return time.perf_counter() - began

    def for_seconds(self, seconds: float) -> list[float]:
        """Step times over about ``seconds``."""
        end = time.perf_counter() + seconds
        found = []
        while time.perf_counter() < end:
            found.append(self.once())
        return found

    def close(self) -> None:
        self.port.close()
        self.bus.close()


def publish_and_freeze(rows: np.ndarray, rounds: int, seconds: float = 5.0) -> tuple[np.ndarray, list[float], int]:
    """Publish-call seconds, the step-time ratio frozen ÷ undisturbed of each round, and messages lost.

    Each round has ``seconds`` undisturbed before and after ``seconds`` with the server stopped by SIGSTOP, so that a
    machine that slows down is not blamed on the server.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loop = Stepping(rows, folder)
        loop.for_seconds(1.0)
        loop.publish.clear()
        ratios = []
        for _ in range(rounds):
            before = loop.for_seconds(seconds / 2)
            loop.bus.server.process.send_signal(signal.SIGSTOP)
            frozen = loop.for_seconds(seconds)
            loop.bus.server.process.send_signal(signal.SIGCONT)
            loop.for_seconds(1.0)  # it catches up
            after = loop.for_seconds(seconds / 2)
            ratios.append(float(np.median(frozen) / np.median(before + after)))
        loop.port.barrier(10)
        lost = loop.bus.counts()["dropped"]
        loop.close()
    return np.array(loop.publish), ratios, lost
