"""`scripts/bench calls`: what must cost next to nothing: an idle tick, a batch from memory, `esper --help`, a dead member's claim."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.benchmarks._machine import machine

ROUNDS = 20


@dataclass
class Call:
    """Seconds of one call, against its limit."""

    name: str
    limit: float
    seconds: Callable[[], float]


def best_of(call: Callable[[int], object], times: int) -> float:
    """Seconds a call, in the best of ROUNDS rounds: what it costs where nothing else wants the processor."""
    found = []
    for turn in range(ROUNDS):
        began = time.perf_counter()
        for number in range(turn * times, (turn + 1) * times):
            call(number)
        found.append((time.perf_counter() - began) / times)
    return min(found)


def idle_tick() -> float:
    """``commands`` and ``end_tick`` of the trainer's port, with a reader in this process and nothing to tell it."""
    from esper.bus import open_bus
    from esper.bus.config import MemoryConfig
    from esper.bus.trainer.bus_port import BusPort

    with tempfile.TemporaryDirectory() as folder:
        bus = open_bus(MemoryConfig(), folder)
        reader = bus.consumer("events", "bench", "controller", "one")
        port = BusPort(bus, "bench", ("a",))
        port.started(0, 1, [])

        def tick(number: int) -> None:
            port.commands(number)
            port.end_tick(number)
            reader.ack(reader.read(1000))

        found = best_of(tick, 100)
        port.close()
        bus.close()
    return found


def batch_from_memory() -> float:
    """The next batch of 64 small images that lie in memory."""
    from esper.tasks.base import InMemory, ready
    from esper.tasks.loading import Batches

    data = InMemory(torch.zeros(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.int64))
    return best_of(Batches(data, 64, 0, ready).at, 100)


def help_text() -> float:
    """A process that prints the help, modules warm in the file cache."""
    took = []
    for _ in range(4):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "esper", "--help"], check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def claim() -> float:
    """From the death of a group's member, with messages in its hands, until another has them; the claim time itself not counted."""
    from esper.bus.config import RedisConfig
    from esper.bus.server.bus import ServerBus
    from esper.bus.server.embedded import EmbeddedServer
    from esper.messages import TickEnded

    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "server")
        bus = ServerBus(RedisConfig(claim_s=0.3), server.address, Path(folder) / "bus")
        producer = bus.producer("events", "bench")
        producer.send(TickEnded(tick=1), 5)
        assert bus.consumer("events", "bench", "group", "dead").read(1, 5)
        began, alive = time.perf_counter(), bus.consumer("events", "bench", "group", "alive")
        while not alive.read(1, 0.05):
            continue
        took = time.perf_counter() - began - bus.config.claim_s
        bus.close()
        server.stop()
    return took


CALLS = (
    Call("a tick with nothing due", 100e-6, idle_tick),
    Call("a batch from memory", 50e-6, batch_from_memory),
    Call("esper --help", 2.0, help_text),
    Call("a dead member's messages, after its claim time", 1.0, claim),
)


def main(arguments: list[str]) -> int:
    """Print what each costs; 1 when a limit is missed."""
    argparse.ArgumentParser(prog="scripts/bench calls", description=__doc__).parse_args(arguments)
    print(machine())
    missed = 0
    for call in CALLS:
        took = call.seconds()
        missed += took > call.limit
        print(f"{call.name:48} {took:12.6f} s ≤ {call.limit:g} s  {'met' if took <= call.limit else 'MISSED'}", flush=True)
    return int(missed > 0)
