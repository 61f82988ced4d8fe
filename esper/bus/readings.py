"""What can be measured of a run's bus at one moment; the Prometheus and OpenTelemetry exporters both show this list."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from esper.bus.protocol import Bus
from esper.lifecycle.stages import Stage

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTED = {
    "sent": "Messages the bus has stored.",
    "received": "Messages handed to consumers in this process, redeliveries included.",
    "acknowledged": "Messages acknowledged by consumers in this process.",
    "dropped": "Messages given up: memory and spool were full, or the server lost more than could be sent again.",
    "gaps": "Sequence numbers that consumers in this process found missing.",
    "duplicates": "Messages recognised as seen before and not handed out again.",
    "refused": "Messages that were corrupt, malformed, oversized, newer or of another run.",
    "dead_letters": "Messages this process gave up on after too many deliveries or because they were unreadable.",
    "retries": "Attempts to reach the server that failed.",
    "late": "Messages released out of order because the bounded hold ran out.",
}


@dataclass(frozen=True)
class Reading:
    """One value; ``kind`` is counter or gauge."""

    name: str
    kind: str
    help: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


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
    """What the trainer's port knows beyond the bus: seeds by stage, the tick, and how long commands took."""

    def __init__(self) -> None:
        self.tick = 0
        self.stages: Counter[int] = Counter()
        self.commands: dict[str, Histogram] = {}

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


def readings(bus: Bus, run: str, state: PortState) -> list[Reading]:
    """Everything at this moment; what only the server knows is left out while it does not answer."""
    counts = bus.counts()
    found = [
        Reading(f"esper_bus_{name}_messages_total", "counter", text, counts[name]) for name, text in COUNTED.items()
    ]
    found.append(Reading("esper_bus_spool_bytes", "gauge", "Bytes waiting on disk.", counts["spool_bytes"]))
    found.append(Reading("esper_bus_waiting_messages", "gauge", "Published, not yet stored.", counts.get("waiting", 0)))
    found.append(Reading("esper_tick", "gauge", "The tick the trainer is at.", state.tick))
    found += [
        Reading("esper_seeds", "gauge", "Seeds by stage.", state.stages[stage], (("stage", stage.name),))
        for stage in Stage
    ]
    up = bus.local is bus or not bus.writer.open
    server, answered = _server(bus, run) if up and bus.local is not bus else ([], up)
    found.append(Reading("esper_bus_up", "gauge", "1 while the bus answers.", float(up and answered)))
    return found + server


def _server(bus: Bus, run: str) -> tuple[list[Reading], bool]:
    import redis

    from esper.bus.server.status import status

    try:
        began = time.perf_counter()
        found = status(bus, run)
        took = time.perf_counter() - began
    except redis.RedisError:
        return [], False
    result = [
        Reading("esper_bus_dead_letters", "gauge", "Dead letters lying on the server.", found.dead_letters),
        Reading("esper_bus_status_seconds", "gauge", "How long the server took to say how it is.", took),
    ]
    for stream in found.streams:
        labels = (("stream", stream.stream), ("producer", stream.producer))
        result.append(Reading("esper_bus_entries", "gauge", "Entries on the server.", stream.entries, labels))
        for group in stream.groups:
            named = (*labels, ("group", group.name))
            result += [
                Reading("esper_bus_pending_messages", "gauge", "Delivered, not acknowledged.", group.pending, named),
                Reading("esper_bus_behind_messages", "gauge", "Not yet delivered.", group.behind, named),
                Reading(
                    "esper_bus_oldest_unacknowledged_seconds",
                    "gauge",
                    "Age of the oldest message delivered and not acknowledged.",
                    group.oldest_s,
                    named,
                ),
            ]
    return result, True
