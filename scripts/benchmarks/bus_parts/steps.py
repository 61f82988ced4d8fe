"""What the bus costs inside a training step: the publish call, and the step while the server is frozen.

The publish call is what the engine does with rows it has just computed: it asks the port for their place and, when they are
written there, gives them back (``port.slot``, ``port.telemetry``); writing them is the computing, and is not counted. As a
floor, the same bytes are copied by one bare ``copy_`` in the same step, as cold as the call is: they take turns at being first.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from bus_parts.rows import NAMES, SEEDS

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig
from esper.bus.trainer.bus_port import BusPort


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
        self._places = list(torch.zeros(64, SEEDS, len(NAMES)))
        self._step = training_step()
        self._tick = 0
        self.phase = "undisturbed"
        self.publish: dict[str, list[float]] = {}
        self.floor: list[float] = []

    def once(self) -> float:
        """One step; its seconds, without those of the floor."""
        began = time.perf_counter()
        self._step()
        rows = self._rows[self._tick % len(self._rows)]
        copied = self._copy(rows) if self._tick % 2 else 0.0
        self._publish(rows)
        copied += 0.0 if self._tick % 2 else self._copy(rows)
        self.port.end_tick(self._tick)
        self._tick += 1
        return time.perf_counter() - began - copied

    def _publish(self, rows: torch.Tensor) -> None:
        before = time.perf_counter()
        slot = self.port.slot("site", SEEDS)
        asked = time.perf_counter()
        slot.copy_(rows)  # in a run they are computed here
        computed = time.perf_counter()
        self.port.telemetry(self._tick, "site", slot)
        after = time.perf_counter()
        self.publish.setdefault(self.phase, []).append(asked - before + after - computed)

    def _copy(self, rows: torch.Tensor) -> float:
        began = time.perf_counter()
        rows, place = rows.clone(), self._places[self._tick % len(self._places)]
        before = time.perf_counter()
        place.copy_(rows)
        after = time.perf_counter()
        self.floor.append(after - before)
        return after - began

    def for_seconds(self, seconds: float, phase: str = "undisturbed") -> list[float]:
        """Step times over about ``seconds``."""
        self.phase = phase
        end = time.perf_counter() + seconds
        found = []
        while time.perf_counter() < end:
            found.append(self.once())
        return found

    def close(self) -> None:
        self.port.close()
        self.bus.close()


@dataclass
class Found:
    """Seconds of publish calls by phase and of the bare copy; step time frozen ÷ undisturbed, a round each; messages lost."""

    publish: dict[str, list[float]]
    floor: list[float]
    ratios: list[float]
    lost: int


def publish_and_freeze(rows: np.ndarray, rounds: int, seconds: float = 5.0) -> Found:
    """The publish calls of ``rounds`` rounds, and what a frozen server does to the steps.

    Each round has ``seconds`` undisturbed before and after ``seconds`` with the server stopped by SIGSTOP, so that a
    machine that slows down is not blamed on the server.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loop = Stepping(rows, folder)
        loop.for_seconds(1.0)
        loop.publish.clear()
        loop.floor.clear()
        ratios = []
        for _ in range(rounds):
            before = loop.for_seconds(seconds / 2)
            loop.bus.server.process.send_signal(signal.SIGSTOP)
            frozen = loop.for_seconds(seconds, "frozen")
            loop.bus.server.process.send_signal(signal.SIGCONT)
            loop.for_seconds(1.0, "catching up")
            after = loop.for_seconds(seconds / 2)
            ratios.append(float(np.median(frozen) / np.median(before + after)))
        loop.port.barrier(10)
        lost = loop.bus.counts()["dropped"]
        loop.close()
    return Found(loop.publish, loop.floor, ratios, lost)
