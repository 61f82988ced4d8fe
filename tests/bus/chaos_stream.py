"""Episodes with one producer and one sink, each in a process of its own.

The producer numbers its messages like ticks; killed, it goes on from its last checkpoint, as a resumed trainer does.
The sink appends every number it has not seen to a file before it acknowledges. In the end the file must read 0, 1, 2, …
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import ClassVar

from chaos import RUN, SETTINGS, Episode, write
from faults import wait_until

from esper.bus.config import RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import address_of
from esper.messages import TickEnded

STREAM, GROUP = "events", "tracker"
CHECKPOINT = 25
PACE_S = 0.002


def opened(url: str, folder: Path) -> ServerBus:
    """The bus of one of the processes."""
    config = RedisConfig(url=url, claim_s=0.5, memory_mb=1, **SETTINGS)
    return ServerBus(config, address_of(config), folder)


def produce(url: str, folder: Path) -> None:
    """Publish numbers until told to stop (a file), then the rest up to the next checkpoint, and say how far."""
    bus = opened(url, folder / "bus")
    producer = bus.producer(STREAM, RUN)
    kept = folder / "checkpoint"
    number = int(kept.read_text()) if kept.exists() else 0
    stop = folder / "stop"
    while not (stop.exists() and number % CHECKPOINT == 0):
        producer.publish(TickEnded(tick=number))
        number += 1
        if number % CHECKPOINT == 0:
            producer.barrier(0.2)
            write(kept, str(number))
        time.sleep(PACE_S)
    while not producer.flush(5):
        continue
    write(folder / "published", json.dumps({"count": number, "dropped": bus.counts()["dropped"]}))
    time.sleep(1.5)  # a server that loses its tail now is still given it again
    bus.close()


def sink(url: str, folder: Path) -> None:
    """Append what was not seen before to a file, then acknowledge."""
    consumer = opened(url, folder / "sink").consumer(STREAM, RUN, GROUP, "one")
    path = folder / "seen"
    seen = set(map(int, path.read_text().split())) if path.exists() else set()
    with path.open("a") as file:
        while True:
            deliveries = consumer.read(50, 0.5)
            for delivery in deliveries:
                tick = delivery.message.tick
                if tick not in seen:
                    seen.add(tick)
                    file.write(f"{tick}\n")
            file.flush()
            consumer.ack(deliveries)


class StreamEpisode(Episode):
    """Nothing lost, nothing doubled, in order, nothing dropped."""

    NAMES = ("produce", "sink")
    FAULTS: ClassVar[dict[str, int]] = Episode.SERVER | {
        "kill producer": 2,
        "kill sink": 2,
        "slow sink": 2,
    }
    STREAMS = (STREAM,)

    def command(self, name: str) -> list[str]:
        """This file as a program."""
        return [sys.executable, __file__, name, self.url, str(self.folder)]

    def settle(self) -> None:
        """Count."""
        published = self.folder / "published"
        if not wait_until(published.exists, 60):
            self.outcome.wrong.append("the producer did not finish")
            return
        found = json.loads(published.read_text())
        count, seen = found["count"], self.folder / "seen"
        wait_until(lambda: len(seen.read_text().split()) >= count, 20)
        numbers = [int(line) for line in seen.read_text().split()]
        bad = {
            "lost": len(set(range(count)) - set(numbers)),
            "doubled": len(numbers) - len(set(numbers)),
            "disordered": sum(a > b for a, b in itertools.pairwise(numbers)),
            "dropped": found["dropped"],
        }
        self.outcome.counts.update(bad, published=count)
        self.outcome.wrong += [f"{value} {name}" for name, value in bad.items() if value]

    def _kill_producer(self) -> None:
        self.again("produce")
        self.progress(self.checkpoint())

    def _kill_sink(self) -> None:
        self.again("sink")

    def _slow_sink(self) -> None:
        self.pause("sink")


if __name__ == "__main__":
    {"produce": produce, "sink": sink}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
