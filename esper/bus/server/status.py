"""The status of a run on a server: streams, groups, how far behind they are, and the counters of its processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from esper.bus.codec import Refused, decode
from esper.bus.protocol import COUNTERS, LARGEST, STREAMS, Id, id_text, parse_id, read_id
from esper.bus.server import keys
from esper.bus.server.connection import Client, connect, unless_other_type

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus


PROCESSES = {"controller": "controller", "tracking": "tracker"}  # group of settings -> what its process is called
EVERY_S = 1.0


def counted(client: Client, run: str, process: str) -> dict[str, int]:
    """The last counters of a process, by COUNTERS: zeros where there are none, or none that can be read."""
    lying = unless_other_type(lambda: client.get(keys.counts(run, process)), None)
    try:
        said = msgspec.json.decode(lying or b"{}", type=dict[str, int])
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = {}
    return {name: said.get(name, 0) for name in COUNTERS}


class CountsReport:
    """Writes the counters of ``bus``, on top of ``since``, to the server, at once and then every EVERY_S seconds if it changed."""

    def __init__(self, bus: ServerBus, key: str, since: dict[str, int]) -> None:
        self._bus, self._key, self._since = bus, key, since
        self._client = connect(bus.address, bus.config.timeout_s)
        self._written: dict[str, int] = {}
        self._next = 0.0

    def work(self, last: bool = False) -> None:
        """Called from the sender thread; a server that is away is told when it is back, if that is before the ``last`` time."""
        import redis

        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + EVERY_S
        try:
            self.write()
        except redis.RedisError:  # the sender itself notices and reports a server that is gone
            self._written = {}

    def write(self) -> None:
        """Write them now, if they changed; raises redis errors."""
        mine = self._bus.counters.snapshot()
        counts = {name: mine[name] + self._since.get(name, 0) for name in COUNTERS}
        if counts != self._written:
            self._client.set(self._key, msgspec.json.encode(counts))
            self._written = counts


@contextmanager
def reporting_counts(bus: ServerBus, run: str, part: str) -> Iterator[None]:
    """Within: the counters of ``bus`` are on the server for ``part`` of ``run``, written by the bus's sender thread.

    A controller goes on with the counts of its earlier lives, as with their work; a tracker reads and counts all anew.
    """
    process = PROCESSES[part]
    since = counted(bus.client, run, process) if process == "controller" else {}
    reported = CountsReport(bus, keys.counts(run, process), since)
    reported.write()
    bus.sender.each_round(reported.work)
    try:
        yield
    finally:
        reported.work(last=True)


NO_STREAM = "no stream"  # in place of the last id, where somebody else uses the key


class GroupStatus(msgspec.Struct):
    """A consumer group on one producer's stream: delivered but not acknowledged, and not yet delivered."""

    name: str
    pending: int
    behind: int
    oldest_s: float  # since the oldest unacknowledged message was sent, by the sender's clock


class StreamStatus(msgspec.Struct):
    """One producer's stream."""

    stream: str
    producer: str
    entries: int
    last: str
    groups: list[GroupStatus]


class RunStatus(msgspec.Struct):
    """One run on a server."""

    run: str
    server: str
    dead_letters: int
    streams: list[StreamStatus]
    counts: dict[str, dict[str, int]]  # of the controller and the tracker, where they are processes of their own


def status(bus: ServerBus, run: str) -> RunStatus:
    """Everything there is of ``run``."""
    client = bus.client
    server = client.info("server")
    name = server.get("server_name", "redis")
    version = server.get("valkey_version") or server["redis_version"]
    streams = []
    for stream in STREAMS:
        streams += [_stream(bus, run, stream, producer) for producer in bus.producers(run, stream)]
    counts = {process: counted(client, run, process) for process in PROCESSES.values()}
    dead = unless_other_type(lambda: client.xlen(keys.dead(run)), 0)
    return RunStatus(run, f"{name} {version} at {bus.address!r}", dead, streams, counts)


def _stream(bus: ServerBus, run: str, stream: str, producer: str) -> StreamStatus:
    return unless_other_type(lambda: _entries(bus, run, stream, producer), StreamStatus(stream, producer, 0, NO_STREAM, []))


def _entries(bus: ServerBus, run: str, stream: str, producer: str) -> StreamStatus:
    key = keys.entries(run, stream, producer)
    if not bus.client.exists(key):
        note = read_id(unless_other_type(lambda: bus.client.get(keys.last(run, stream, producer)), None))
        return StreamStatus(stream, producer, 0, id_text(note or (0, 0)), [])
    last = parse_id(bus.client.xinfo_stream(key)["last-generated-id"])
    groups = []
    for group in bus.client.xinfo_groups(key):
        behind = _behind(bus, key, parse_id(group["last-delivered-id"]), last)
        name = group["name"].decode(errors="backslashreplace")
        groups.append(GroupStatus(name, group["pending"], behind, _oldest(bus, key, group["name"])))
    return StreamStatus(stream, producer, bus.client.xlen(key), id_text(last), groups)


def _behind(bus: ServerBus, key: str, delivered: Id, last: Id) -> int:
    """Messages not yet delivered, from their numbers (XINFO's own lag cannot be relied on), over all epochs since."""
    first = bus.client.xrange(key, count=1)
    if first:  # entries that were trimmed before it will never be delivered
        epoch, sequence = parse_id(first[0][0])
        delivered = max(delivered, (epoch, sequence - 1))
    if delivered >= last:
        return 0
    behind, epoch = last[1], delivered[0]
    while epoch < last[0]:  # every start of the producer counted from 1 up to some last number
        final = bus.client.xrevrange(key, f"{epoch}-{LARGEST}", f"{epoch}-0", count=1)
        behind += parse_id(final[0][0])[1] if final else 0
        following = bus.client.xrange(key, f"({epoch}-{LARGEST}", "+", count=1)
        epoch = parse_id(following[0][0])[0] if following else last[0]
    return behind - delivered[1]


def _oldest(bus: ServerBus, key: str, group: bytes) -> float:
    first = bus.client.xpending(key, group)["min"]
    entries = bus.client.xrange(key, first, first) if first else []
    try:
        return max(0.0, time.time() - decode(entries[0][1][b"m"]).time) if entries else 0.0
    except (Refused, KeyError):
        return 0.0
