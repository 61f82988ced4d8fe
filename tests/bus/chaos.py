"""Random faults on a real server and on real processes around it: what every kind of episode shares.

``chaos_stream`` has one producer and one sink and counts every number; ``chaos_run`` has a whole run, its controller and its tracker.
"""

from __future__ import annotations

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
from typing import ClassVar

from faults import FaultProxy, FragileServer, wait_until

from esper.bus.server import keys
from esper.bus.server.connection import PASSWORD_VARIABLE, connect

RUN = "chaos"
SETTINGS = {"timeout_s": 0.4, "retry_s": 0.1, "deliveries": 5}
HERE = Path(__file__).resolve().parent


@dataclass
class Outcome:
    """What an episode ended with; the counts of messages that were wrong, and what is wrong in words."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.wrong


class Episode:
    """One server, its clients behind a fault proxy, and what happens to them."""

    SERVER: ClassVar[dict[str, int]] = {
        "kill server": 3,
        "cut server's tail": 2,
        "freeze server": 3,
        "lose replies": 4,
        "reset connections": 4,
        "deliver again": 2,
        "poison": 2,
    }
    FAULTS: ClassVar[dict[str, int]]  # by kind, how often against the others
    NAMES: ClassVar[tuple[str, ...]]  # of the processes
    STREAMS: ClassVar[tuple[str, ...]]  # that they use

    def __init__(self, seed: int, folder: Path) -> None:
        self.outcome = Outcome(seed)
        self.random = random.Random(seed)
        self.folder = folder
        self.server = FragileServer(folder / "server")
        self.proxy = FaultProxy(self.server.address)
        self.prepare()
        self.parts = {name: self.start(name) for name in self.NAMES}

    def run(self, faults: int | tuple[str, ...]) -> Outcome:
        """So many random faults, or just these, then calm, then the count."""
        kinds = self.random.choices(list(self.FAULTS), list(self.FAULTS.values()), k=faults) if isinstance(faults, int) else faults
        try:
            if not self.progress(before=None):
                self.outcome.wrong.append("it did not start")
                return self.outcome
            for name in kinds:
                if not self.all_alive():
                    break
                getattr(self, "_" + name.replace(" ", "_").replace("'", ""))()
                self.outcome.faults[name] += 1
                time.sleep(self.random.uniform(0.0, 0.1))
            if self.all_alive():
                (self.folder / "stop").touch()
                self.settle()
        finally:
            self.close()
        return self.outcome

    def close(self) -> None:
        """Stop everything."""
        for part in self.parts.values():
            part.kill()
            part.wait()
        self.proxy.close()
        self.server.kill()

    # --- what a kind of episode says ---

    def prepare(self) -> None:
        """Before the processes start."""

    def command(self, name: str) -> list[str]:
        """What starts one of NAMES."""
        raise NotImplementedError

    def settle(self) -> None:
        """The folder has its file ``stop``: wait for the end and note in the outcome what is wrong."""
        raise NotImplementedError

    # --- the processes ---

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """One of the processes; what it says goes to a log."""
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", PASSWORD_VARIABLE: self.server.note.password}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(self.command(name), env=environment, stdout=log, stderr=log)

    def again(self, name: str) -> None:
        """``kill -9`` and start."""
        self.parts[name].kill()
        self.parts[name].wait()
        self.parts[name] = self.start(name)

    def pause(self, name: str) -> None:
        """SIGSTOP for a moment."""
        self.parts[name].send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.05, 0.7))
        self.parts[name].send_signal(signal.SIGCONT)

    def all_alive(self) -> bool:
        """Whether no process has ended by itself."""
        ended = [f"{name} ended with {part.returncode}" for name, part in self.parts.items() if part.poll() is not None]
        self.outcome.wrong += ended
        return not ended

    def progress(self, before: str | None, seconds: float = 30.0) -> bool:
        """Wait until the one who publishes has a checkpoint later than ``before``."""
        return wait_until(lambda: self.checkpoint() not in (None, before), seconds)

    def checkpoint(self) -> str | None:
        """What the last checkpoint says."""
        path = self.folder / "checkpoint"
        return path.read_text() if path.exists() else None

    # --- faults of the server ---

    def _kill_server(self) -> None:
        self.server.restart()

    def _cut_servers_tail(self) -> None:
        self.server.restart(cut_bytes=self.random.randint(1, 4000))
        # One disaster at a time: the server's amnesia is cured by the producers' memory, so that must live this long.
        self.progress(self.checkpoint())
        time.sleep(1.2)

    def _freeze_server(self) -> None:
        self.server.freeze()
        time.sleep(self.random.uniform(0.05, 0.8))
        self.server.thaw()

    def _lose_replies(self) -> None:
        self.proxy.reset_after_request(self.random.randint(1, 4))

    def _reset_connections(self) -> None:
        self.proxy.reset_all()

    def _deliver_again(self) -> None:
        """Have the server hand out the last messages of a stream a second time, to every group."""
        stream, count = self.random.choice(self.STREAMS), self.random.randint(2, 40)
        with connect(self.server.address, 2) as client:
            for producer in client.smembers(keys.producers(RUN, stream)):
                key = keys.entries(RUN, stream, producer.decode())
                if client.type(key) != b"stream" or producer == b"poison":
                    continue
                for group in client.xinfo_groups(key):
                    delivered = client.xrevrange(key, group["last-delivered-id"], count=count)
                    if delivered:  # back, never forward: that would be telling the server to skip messages
                        client.xgroup_setid(key, group["name"], delivered[-1][0])

    def _poison(self) -> None:
        """Somebody who may write there writes nonsense."""
        stream = self.random.choice(self.STREAMS)
        with connect(self.server.address, 2) as client:
            client.sadd(keys.producers(RUN, stream), "poison")
            client.xadd(keys.entries(RUN, stream, "poison"), {"m": self.random.randbytes(self.random.randint(0, 200))})

    @property
    def url(self) -> str:
        """Where the processes find the server: behind the proxy."""
        return f"redis://127.0.0.1:{self.proxy.address.tcp_port}/0"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def episode(kind: type[Episode], seed: int, faults: int | tuple[str, ...]) -> Outcome:
    """One episode in a folder of its own; where it is not clean, what the processes said goes to stderr."""
    with tempfile.TemporaryDirectory(prefix="esper-chaos-") as folder:
        outcome = kind(seed, Path(folder)).run(faults)
        if not outcome.clean:
            for log in sorted(Path(folder).glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text()[-4000:]}\n")
        return outcome
