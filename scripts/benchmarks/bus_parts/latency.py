"""How long a command takes to a receiver in its own process and back, with telemetry beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bus_parts.rows import NAMES, training_rows

from esper.bus.config import RedisConfig
from esper.bus.messages import Acknowledgement, RequestReport, Telemetry
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import connect
from esper.bus.server.embedded import EmbeddedServer, address_in

BYTES_A_SECOND = 15e6
RUN = "bench"


def receiver(folder: str) -> None:
    """Acknowledges every command as delivered."""
    bus = ServerBus(RedisConfig(), address_in(Path(folder)), Path(folder) / "receiver")
    consumer, producer = bus.consumer("commands", RUN, "trainer", "trainer"), bus.producer("acks", RUN)
    print("ready", flush=True)
    while True:
        found = consumer.read(10, 1.0)
        for delivery in found:
            producer.send(Acknowledgement(command_id=delivery.message.id, status="delivered"), 5)
        consumer.ack(found)


def load(folder: str) -> None:
    """15 MB/s of telemetry, raw on the wire, acknowledged by a consumer of its own in the same process."""
    bus = ServerBus(RedisConfig(codec="raw"), address_in(Path(folder)), Path(folder) / "load")
    producer, consumer = bus.producer("telemetry", RUN), bus.consumer("telemetry", RUN, "sink", "one")
    rows = training_rows(16)
    data = rows.tobytes()
    print("ready", flush=True)
    began, sent = time.monotonic(), 0
    while True:
        producer.publish(Telemetry(site="site", ticks=list(range(16)), seeds=1000, columns=list(NAMES), data=data))
        sent += len(data)
        consumer.ack(consumer.read(10))
        time.sleep(max(0.0, began + sent / BYTES_A_SECOND - time.monotonic()))


def round_trips(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of command round trips and of PINGs, taken in turns under the same load."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder))
        parts = [_start(part, folder) for part in ("receiver", "load")]
        bus = ServerBus(RedisConfig(), server.address, Path(folder) / "sender")
        producer, consumer = bus.producer("commands", RUN), bus.consumer("acks", RUN, "sender", "one")
        client = connect(server.address, 5)
        trips, pings, end, number = [], [], time.monotonic() + seconds, 0
        while time.monotonic() < end:
            number += 1
            began = time.perf_counter()
            producer.send(RequestReport(id=str(number)), 5)
            while not (found := consumer.read(1, 1.0)):
                continue
            trips.append(time.perf_counter() - began)
            consumer.ack(found)
            began = time.perf_counter()
            client.ping()
            pings.append(time.perf_counter() - began)
            time.sleep(0.005)
        for part in parts:
            part.kill()
            part.wait()
        bus.close()
        server.stop()
    return np.array(trips[50:]), np.array(pings[50:])


def _start(part: str, folder: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts" / "benchmarks")])}
    command = [sys.executable, "-m", "bus_parts.latency", part, folder]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


if __name__ == "__main__":
    {"receiver": receiver, "load": load}[sys.argv[1]](sys.argv[2])
