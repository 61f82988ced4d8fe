"""How much goes through: end to end on a server with everything on one core, and inside one process."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from bus_parts.rows import NAMES, SEEDS

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, MemoryConfig
from esper.bus.server.connection import connect
from esper.bus.server.embedded import EmbeddedServer
from esper.bus.trainer.bus_port import BusPort
from esper.messages import TickEnded

IN_FLIGHT = 48  # messages the publisher is ahead of the server, as a training step would not be


class OneCore:
    """Confines this process, and the servers it starts, to one core."""

    def __enter__(self) -> None:
        self._before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(self._before)})

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._before)


def processor_s(server: int) -> float:
    """Processor time of this process and of the server so far, in seconds."""
    used = psutil.Process(server).cpu_times()
    return time.process_time() + used.user + used.system


def end_to_end(rows: np.ndarray, codec: str, ticks: int) -> tuple[float, float]:
    """Seed-records from ``port.telemetry`` to the acknowledgement, all on one core: a second by the clock, and a second
    of processor time (what the clock would say on a machine with nothing else to do, at most)."""
    with OneCore(), tempfile.TemporaryDirectory() as folder:
        bus = open_bus(EmbeddedConfig(codec=codec), folder)
        port = BusPort(bus, "bench", NAMES)
        consumer = bus.consumer("telemetry", "bench", "bench", "one")
        port.started(0, ticks, [])

        given = torch.from_numpy(rows)

        def publish() -> None:
            for tick in range(ticks):
                port.telemetry(tick, "site", given[tick % len(given)])
                while bus.counts()["waiting"] > IN_FLIGHT:
                    time.sleep(0.0005)
            port.barrier()

        publisher = threading.Thread(target=publish)
        received, began, used = 0, time.perf_counter(), processor_s(bus.server.process.pid)
        publisher.start()
        while received < ticks:
            found = consumer.read(4, 1.0)
            received += sum(len(delivery.message.ticks) for delivery in found)
            consumer.ack(found)
        took = time.perf_counter() - began
        used = processor_s(bus.server.process.pid) - used
        publisher.join()
        port.close()
        bus.close()
    return ticks * SEEDS / took, ticks * SEEDS / used


def one_record_an_entry(rows: np.ndarray, seconds: float = 2.0) -> tuple[float, float]:
    """The plain way, same core: one XADD a seed-record with a field a column, then XREADGROUP and XACK."""
    with OneCore(), tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder))
        client = connect(server.address, 5)
        client.xgroup_create("plain", "bench", id="0", mkstream=True)
        records = [dict(zip(NAMES, map(float, row), strict=True)) for row in rows[0]]
        done, began, used = 0, time.perf_counter(), processor_s(server.process.pid)
        while time.perf_counter() - began < seconds:
            for record in records[:100]:
                client.xadd("plain", record)
            ((_, entries),) = client.xreadgroup("bench", "one", {"plain": ">"}, count=100)
            done += client.xack("plain", "bench", *(id for id, _ in entries))
        took = time.perf_counter() - began
        used = processor_s(server.process.pid) - used
        server.stop()
    return done / took, done / used


def floor(rows: np.ndarray, ticks: int, group: int = 16) -> float:
    """The same bytes by bare redis-py on the same core: no envelope, no checksum, no queue."""
    with OneCore(), tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder))
        client = connect(server.address, 5)
        client.xgroup_create("plain", "bench", id="0", mkstream=True)
        began = time.perf_counter()
        for tick in range(0, ticks, group):
            client.xadd("plain", {"m": rows[tick % len(rows) :][:group].tobytes()})
            ((_, entries),) = client.xreadgroup("bench", "one", {"plain": ">"}, count=4)
            client.xack("plain", "bench", *(id for id, _ in entries))
        took = time.perf_counter() - began
        server.stop()
    return ticks * SEEDS / took


def in_process(messages: int = 200_000) -> tuple[float, np.ndarray]:
    """Messages a second through the bus in memory (published, read, acknowledged), and round-trip times in seconds."""
    bus = open_bus(MemoryConfig(), tempfile.gettempdir())
    consumer, producer = bus.consumer("events", "bench", "bench", "one"), bus.producer("events", "bench")
    began = time.perf_counter()
    for number in range(messages):
        producer.publish(TickEnded(tick=number))
        if number % 256 == 255:
            consumer.ack(consumer.read(256))
    while found := consumer.read(256):
        consumer.ack(found)
    rate = messages / (time.perf_counter() - began)
    trips = []
    for number in range(20_000):
        sent = time.perf_counter()
        producer.publish(TickEnded(tick=number))
        consumer.ack(consumer.read(1))
        trips.append(time.perf_counter() - sent)
    bus.close()
    return rate, np.array(trips)
