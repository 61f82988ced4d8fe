"""What can be measured of a run's bus at one moment; the Prometheus and OpenTelemetry exporters both show this."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esper.bus.monitor import metric_names as metrics
from esper.bus.monitor.metric_names import BUCKETS_S, Metric
from esper.bus.protocol import Bus
from esper.lifecycle.stages import Stage

if TYPE_CHECKING:
    from esper.bus.server.status import RunStatus

TRAINER = "trainer"  # the process that exports; what others count lies on the server


@dataclass(frozen=True)
class Reading:
    """One value of a metric that is no histogram; ``labels`` are values, in the order of the metric's names."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


@dataclass
class Histogram:
    """Durations in seconds by bucket (upper bounds BUCKETS_S, then infinity)."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds


class PortState:
    """What the trainer's port knows beyond the bus: seeds by stage, the tick, and how long commands took.

    ``told`` are called with status and seconds of every command that ends.
    """

    def __init__(self) -> None:
        self.tick = 0
        self.stages: Counter[int] = Counter()
        self.commands: dict[str, Histogram] = {}
        self.told: list[Callable[[str, float], None]] = []

    def started(self, tick: int, sites: list[dict[str, Any]]) -> None:
        """Every seed is DORMANT unless its site says otherwise."""
        self.tick = tick
        for site in sites:
            self.stages.update(site.get("stages") or [int(Stage.DORMANT)] * int(site.get("seeds", 0)))

    def moved(self, seed: int, source: int, target: int) -> None:
        """A seed changed stage; block branches (seed −1) are no seeds."""
        if seed >= 0:
            self.stages[source] -= 1
            self.stages[target] += 1

    def finished(self, status: str, seconds: float) -> None:
        """A command ended ``seconds`` after it was sent."""
        self.commands.setdefault(status, Histogram()).add(seconds)
        for tell in self.told:
            tell(status, seconds)


def readings(bus: Bus, run: str, state: PortState) -> list[Reading]:
    """Everything at this moment; what only the server knows is left out while it does not answer."""
    counts = bus.counts()
    found = _counted(TRAINER, counts)
    found.append(Reading(metrics.SPOOL, counts["spool_bytes"]))
    found.append(Reading(metrics.WAITING, counts.get("waiting", 0)))
    found.append(Reading(metrics.TICK, state.tick))
    found += [Reading(metrics.SEEDS, state.stages[stage], (stage.name,)) for stage in Stage]
    up = bus.local is bus or not bus.writer.open
    server, answered = _server(bus, run) if up and bus.local is not bus else ([], up)
    found.append(Reading(metrics.UP, float(up and answered)))
    return found + server


def _counted(process: str, counts: dict[str, int]) -> list[Reading]:
    return [Reading(metric, counts.get(name, 0), (process,)) for name, metric in metrics.COUNTED.items()]


def _server(bus: Bus, run: str) -> tuple[list[Reading], bool]:
    import redis

    from esper.bus.server.status import status

    try:
        began = time.perf_counter()
        found = status(bus, run)
        took = time.perf_counter() - began
    except redis.RedisError:
        return [], False
    return [Reading(metrics.STATUS, took), *_lying(found)], True


def _lying(found: RunStatus) -> list[Reading]:
    """What lies on the server, and what those who read there have counted."""
    result = [Reading(metrics.DEAD_LETTERS, found.dead_letters)]
    for process, counts in found.counts.items():
        result += _counted(process, counts)
    for stream in found.streams:
        labels = (stream.stream, stream.producer)
        result.append(Reading(metrics.ENTRIES, stream.entries, labels))
        for group in stream.groups:
            named = (*labels, group.name)
            result.append(Reading(metrics.PENDING, group.pending, named))
            result.append(Reading(metrics.BEHIND, group.behind, named))
            result.append(Reading(metrics.OLDEST, group.oldest_s, named))
    return result
