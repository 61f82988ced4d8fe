"""What a server holds of a run: streams, groups, how far behind they are, and the health of it all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from esper.bus.codec import Refused, decode
from esper.bus.ids import Id, parse
from esper.bus.protocol import STREAMS
from esper.bus.server import keys
from esper.bus.server.counted import PROCESSES, counted

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus


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
        for producer in sorted(member.decode() for member in client.smembers(keys.producers(run, stream))):
            streams.append(_stream(bus, run, stream, producer))
    counts = {process: counted(client, run, process) for process in PROCESSES.values()}
    return RunStatus(run, f"{name} {version} at {bus.address!r}", client.xlen(keys.dead(run)), streams, counts)


def _stream(bus: ServerBus, run: str, stream: str, producer: str) -> StreamStatus:
    key = keys.entries(run, stream, producer)
    last = (bus.client.get(keys.last(run, stream, producer)) or b"0-0").decode()
    if not bus.client.exists(key):
        return StreamStatus(stream, producer, 0, last, [])
    groups = []
    for group in bus.client.xinfo_groups(key):
        behind = _behind(bus, key, parse(group["last-delivered-id"]), parse(last))
        groups.append(GroupStatus(group["name"].decode(), group["pending"], behind, _oldest(bus, key, group["name"])))
    return StreamStatus(stream, producer, bus.client.xlen(key), last, groups)


def _behind(bus: ServerBus, key: str, delivered: Id, last: Id) -> int:
    """Messages not yet delivered, from their numbers (XINFO's own lag cannot be relied on), over all epochs since."""
    first = bus.client.xrange(key, count=1)
    if first:  # what was trimmed before it will never be delivered
        epoch, sequence = parse(first[0][0])
        delivered = max(delivered, (epoch, sequence - 1))
    if delivered >= last:
        return 0
    behind = last[1]
    for epoch in range(delivered[0], last[0]):  # every start of the producer counted from 1 up to some last number
        final = bus.client.xrevrange(key, f"{epoch}-{(1 << 64) - 1}", f"{epoch}-0", count=1)
        behind += parse(final[0][0])[1] if final else 0
    return behind - delivered[1]


def _oldest(bus: ServerBus, key: str, group: bytes) -> float:
    first = bus.client.xpending(key, group)["min"]
    entries = bus.client.xrange(key, first, first) if first else []
    try:
        return max(0.0, time.time() - decode(entries[0][1][b"m"]).time) if entries else 0.0
    except (Refused, KeyError):
        return 0.0
