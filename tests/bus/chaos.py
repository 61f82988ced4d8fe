"""Episodes of random faults on a real server, between a producer and a sink in processes of their own.

The producer numbers its messages like ticks; killed, it goes on from its last checkpoint, as a resumed trainer does.
The sink appends every number it has not seen to a file before it acknowledges. In the end the file must read 0, 1, 2, …
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from faults import FaultProxy, FragileServer, wait_until

from esper.bus.config import RedisConfig
from esper.bus.messages import TickEnded
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import Address, connect

RUN, STREAM, GROUP = "chaos", "events", "tracker"
SETTINGS = {"timeout_s": 0.4, "retry_s": 0.1, "claim_s": 0.5, "deliveries": 1000, "memory_mb": 1}
CHECKPOINT = 25
PACE_S = 0.002
FAULTS = {
    "kill server": 3,
    "cut server's tail": 2,
    "freeze server": 3,
    "lose replies": 4,
    "reset connections": 4,
    "kill producer": 2,
    "kill sink": 2,
    "slow sink": 2,
    "deliver again": 2,
    "poison": 2,
}


def produce(port: int, password: str, folder: Path) -> None:
    """Publish numbers until told to stop (a file), then the rest up to the next checkpoint, and say how far."""
    bus = ServerBus(RedisConfig(**SETTINGS), Address("127.0.0.1", port, password=password), folder / "bus")
    producer = bus.producer(STREAM, RUN)
    kept = folder / "checkpoint"
    number = int(kept.read_text()) if kept.exists() else 0
    stop = folder / "stop"
    while not (stop.exists() and number % CHECKPOINT == 0):
        producer.publish(TickEnded(tick=number))
        number += 1
        if number % CHECKPOINT == 0:
            producer.barrier(0.2)
            _write(kept, str(number))
        time.sleep(PACE_S)
    while not producer.flush(5):
        continue
    _write(folder / "published", json.dumps({"count": number, "dropped": bus.counts()["dropped"]}))
    time.sleep(1.5)  # a server that loses its tail now is still given it again
    bus.close()


def sink(port: int, password: str, folder: Path) -> None:
    """Append what was not seen before to a file, then acknowledge."""
    bus = ServerBus(RedisConfig(**SETTINGS), Address("127.0.0.1", port, password=password), folder / "sink")
    consumer = bus.consumer(STREAM, RUN, GROUP, "one")
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


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


@dataclass
class Outcome:
    """What an episode ended with."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    published: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    dropped: int = 0
    finished: bool = True

    @property
    def clean(self) -> bool:
        return self.finished and not (self.lost or self.doubled or self.disordered or self.dropped)


class Episode:
    """One server, one producer, one sink, and what happens to them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.outcome = Outcome(seed)
        self._random = random.Random(seed)
        self._folder = folder
        self._server = FragileServer(folder / "server")
        self._proxy = FaultProxy(self._server.address)
        self._parts = {name: self._start(name) for name in ("produce", "sink")}

    def run(self, faults: int) -> Outcome:
        """So many random faults, then calm, then the count."""
        try:
            assert wait_until((self._folder / "checkpoint").exists, 20), "the producer did not start"
            for _ in range(faults):
                name = self._random.choices(list(FAULTS), list(FAULTS.values()))[0]
                getattr(self, "_" + name.replace(" ", "_").replace("'", ""))()
                self.outcome.faults[name] += 1
                time.sleep(self._random.uniform(0.0, 0.1))
            self._settle()
        finally:
            self.close()
        return self.outcome

    def close(self) -> None:
        """Stop everything."""
        for part in self._parts.values():
            part.kill()
            part.wait()
        self._proxy.close()
        self._server.kill()

    def _settle(self) -> None:
        (self._folder / "stop").touch()
        published = self._folder / "published"
        self.outcome.finished = wait_until(published.exists, 60)
        if not self.outcome.finished:
            return
        found = json.loads(published.read_text())
        count = self.outcome.published = found["count"]
        self.outcome.dropped = found["dropped"]
        seen = self._folder / "seen"
        wait_until(lambda: len(seen.read_text().split()) >= count, 20)
        numbers = [int(line) for line in seen.read_text().split()]
        self.outcome.lost = len(set(range(count)) - set(numbers))
        self.outcome.doubled = len(numbers) - len(set(numbers))
        self.outcome.disordered = sum(a > b for a, b in itertools.pairwise(numbers))

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        root = Path(__file__).resolve().parents[2]
        here = str(Path(__file__).resolve().parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), here]), "OMP_NUM_THREADS": "1"}
        target = self._proxy.address
        command = [sys.executable, __file__, name, str(target.port), target.password, str(self._folder)]
        log = (self._folder / f"{name}.log").open("ab")
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _progress(self, seconds: float = 20.0) -> None:
        """Wait until the producer has got a checkpoint through."""
        kept = self._folder / "checkpoint"
        before = kept.read_text()
        wait_until(lambda: kept.read_text() != before, seconds)

    def _kill_server(self) -> None:
        self._server.restart()

    def _cut_servers_tail(self) -> None:
        self._server.restart(cut_bytes=self._random.randint(1, 4000))
        # One disaster at a time: the server's amnesia is cured by the producer's memory, so that must live this long.
        self._progress()
        time.sleep(1.2)

    def _freeze_server(self) -> None:
        self._server.freeze()
        time.sleep(self._random.uniform(0.05, 0.8))
        self._server.thaw()

    def _lose_replies(self) -> None:
        self._proxy.reset_after_request(self._random.randint(1, 4))

    def _reset_connections(self) -> None:
        self._proxy.reset_all()

    def _kill_producer(self) -> None:
        self._again("produce")
        self._progress()

    def _kill_sink(self) -> None:
        self._again("sink")

    def _again(self, name: str) -> None:
        self._parts[name].kill()
        self._parts[name].wait()
        self._parts[name] = self._start(name)

    def _slow_sink(self) -> None:
        self._parts["sink"].send_signal(signal.SIGSTOP)
        time.sleep(self._random.uniform(0.05, 0.7))
        self._parts["sink"].send_signal(signal.SIGCONT)

    def _deliver_again(self) -> None:
        """Have the server hand out the last messages it delivered a second time."""
        with connect(self._server.address, 2) as client:
            key = f"esper:{{{RUN}}}:{STREAM}:main"
            count = self._random.randint(2, 40)
            for group in client.xinfo_groups(key) if client.exists(key) else ():
                delivered = client.xrevrange(key, group["last-delivered-id"], count=count)
                if delivered:  # back, never forward: that would be telling the server to skip messages
                    client.xgroup_setid(key, group["name"], delivered[-1][0])

    def _poison(self) -> None:
        with connect(self._server.address, 2) as client:
            client.sadd(f"esper:{{{RUN}}}:{STREAM}", "poison")
            client.xadd(f"esper:{{{RUN}}}:{STREAM}:poison", {"m": self._random.randbytes(self._random.randint(0, 200))})


def episode(seed: int, faults: int) -> Outcome:
    """One episode in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="esper-chaos-") as folder:
        outcome = Episode(seed, Path(folder)).run(faults)
        if not outcome.clean:
            for log in Path(folder).glob("*.log"):
                sys.stderr.write(f"--- {log.name}\n{log.read_text()[-2000:]}\n")
        return outcome


if __name__ == "__main__":
    {"produce": produce, "sink": sink}[sys.argv[1]](int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
