"""How long a command takes to a receiver in its own process and back, with telemetry beside it.

Three things are timed in turns, under the same load and after the same kind of pause:

- a *trip*: ``send`` of a command, read by the receiver, whose acknowledgement is sent and read here. That is four requests
  and two processes to be woken one after the other, so it cannot come near one PING;
- a *PING*: one request to the same server over an open connection, the least that anything takes there just then;
- a *bare* trip: the same way by redis-py alone (XADD, XREADGROUP in another process, XADD, XREADGROUP), without envelope,
  checksum, fencing or reading back: the floor for a trip.

Before each there is a random pause of up to PAUSE_S. It lets everybody fall asleep, as between commands of a run: a PING sent
right after a trip would find a server and a processor just woken by that trip, and a trip after a pause would be compared with
a better world. Random, and drawn from a fixed seed, so that no turn falls into step with the load.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bus_parts.rows import NAMES, training_rows

from esper.bus.config import RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import connect
from esper.bus.server.embedded import EmbeddedServer, address_in
from esper.messages import Acknowledgement, RequestReport, Telemetry

BYTES_A_SECOND = 15e6
PAUSE_S = 0.05
WARM = 20  # turns before those that count
RUN = "bench"
THERE, BACK, GROUP = "bare:there", "bare:back", "bench"  # streams of the bare trip


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


def echo(folder: str) -> None:
    """Sends back what comes, by redis-py alone."""
    client = connect(address_in(Path(folder)), 5)
    client.xgroup_create(THERE, GROUP, id="0", mkstream=True)
    print("ready", flush=True)
    while True:
        for _, entries in client.xreadgroup(GROUP, "echo", {THERE: ">"}, count=10, block=1000) or ():
            for id, fields in entries:
                client.xadd(BACK, fields)
                client.xack(THERE, GROUP, id)


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


@dataclass
class Trips:
    """Seconds of each turn, in order."""

    trips: list[float] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)


class Sender:
    """The near end of the trips."""

    def __init__(self, server: EmbeddedServer, folder: Path) -> None:
        self.bus = ServerBus(RedisConfig(), server.address, folder)
        self._producer, self._consumer = self.bus.producer("commands", RUN), self.bus.consumer("acks", RUN, "sender", "one")
        self._client = connect(server.address, 5)
        self._client.xgroup_create(BACK, GROUP, id="0", mkstream=True)
        self._number = 0

    def trip(self) -> float:
        """Seconds of one trip."""
        self._number += 1
        began = time.perf_counter()
        self._producer.send(RequestReport(id=str(self._number)), 5)
        while not (found := self._consumer.read(1, 1.0)):
            continue
        took = time.perf_counter() - began
        self._consumer.ack(found)
        return took

    def ping(self) -> float:
        """Seconds of one PING."""
        began = time.perf_counter()
        self._client.ping()
        return time.perf_counter() - began

    def bare(self) -> float:
        """Seconds of one bare trip."""
        began = time.perf_counter()
        self._client.xadd(THERE, {"m": b"command"})
        while not (found := self._client.xreadgroup(GROUP, "sender", {BACK: ">"}, count=1, block=1000)):
            continue
        took = time.perf_counter() - began
        self._client.xack(BACK, GROUP, found[0][1][0][0])
        return took


def round_trips(seconds: float) -> Trips:
    """Command round trips, PINGs and bare round trips, in turns under the same load."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder))
        parts = [_start(part, folder) for part in ("receiver", "echo", "load")]
        sender, draws = Sender(server, Path(folder) / "sender"), random.Random(0)
        found, end = Trips(), time.monotonic() + seconds
        while time.monotonic() < end:
            for times, turn in ((found.trips, sender.trip), (found.pings, sender.ping), (found.bare, sender.bare)):
                time.sleep(draws.uniform(0.0, PAUSE_S))
                times.append(turn())
        for part in parts:
            part.kill()
            part.wait()
        sender.bus.close()
        server.stop()
    return Trips(found.trips[WARM:], found.pings[WARM:], found.bare[WARM:])


def _start(part: str, folder: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts" / "benchmarks")])}
    command = [sys.executable, "-m", "bus_parts.latency", part, folder]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


if __name__ == "__main__":
    {"receiver": receiver, "echo": echo, "load": load}[sys.argv[1]](sys.argv[2])
