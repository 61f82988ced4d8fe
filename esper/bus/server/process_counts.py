"""What processes beside the trainer count, said on the server: nobody could ask them, and a killed one takes its counts along."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from esper.bus.protocol import COUNTERS
from esper.bus.server import keys
from esper.bus.server.connection import connect, unless_other_type

if TYPE_CHECKING:
    import redis

    from esper.bus.server.bus import ServerBus

PROCESSES = {"controller": "controller", "tracking": "tracker"}  # group of settings -> what its process is called
EVERY_S = 1.0


def counted(client: redis.Redis, run: str, process: str) -> dict[str, int]:
    """What a process has last said, by COUNTERS: zeros where it has said nothing, or nothing readable."""
    lying = unless_other_type(lambda: client.get(keys.counts(run, process)), None)
    try:
        said = msgspec.json.decode(lying or b"{}", type=dict[str, int])
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = {}
    return {name: said.get(name, 0) for name in COUNTERS}


class Report:
    """Says what ``bus`` counts, on top of ``since``, at once and then every EVERY_S seconds if it changed."""

    def __init__(self, bus: ServerBus, key: str, since: dict[str, int]) -> None:
        self._bus, self._key, self._since = bus, key, since
        self._client = connect(bus.address, bus.config.timeout_s)
        self._said: dict[str, int] = {}
        self._next = 0.0

    def work(self, last: bool = False) -> None:
        """Called from the writer thread; a server that is away is told when it is back, if that is before the ``last`` time."""
        import redis

        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + EVERY_S
        try:
            self.say()
        except redis.RedisError:  # the writer itself notices and reports a server that is gone
            self._said = {}

    def say(self) -> None:
        """Say it now, if it changed; raises redis errors."""
        mine = self._bus.counters.snapshot()
        counts = {name: mine[name] + self._since.get(name, 0) for name in COUNTERS}
        if counts != self._said:
            self._client.set(self._key, msgspec.json.encode(counts))
            self._said = counts


@contextmanager
def report(bus: ServerBus, run: str, part: str) -> Iterator[None]:
    """Within: what ``bus`` counts is on the server for ``part`` of ``run``, from the bus's writer thread.

    A controller goes on with the counts of its earlier lives, as with their work; a tracker reads and counts all anew.
    """
    process = PROCESSES[part]
    since = counted(bus.client, run, process) if process == "controller" else {}
    saying = Report(bus, keys.counts(run, process), since)
    saying.say()
    bus.writer.each_round(saying.work)
    try:
        yield
    finally:
        saying.work(last=True)
