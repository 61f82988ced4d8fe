"""What a server holds of a run: streams, groups, how far behind they are, and the health of it all."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from esper.bus.codec import Refused, decode
from esper.bus.protocol import LARGEST, STREAMS, Id, id_text, parse_id, read_id
from esper.bus.server import keys
from esper.bus.server.connection import unless_other_type
from esper.bus.server.process_counts import PROCESSES, counted

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus


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
        members = unless_other_type(partial(client.smembers, keys.producers(run, stream)), set())
        streams += [_stream(bus, run, stream, producer) for producer in keys.names(members)]
    counts = {process: counted(client, run, process) for process in PROCESSES.values()}
    dead = unless_other_type(lambda: client.xlen(keys.dead(run)), 0)
    return RunStatus(run, f"{name} {version} at {bus.address!r}", dead, streams, counts)


def _stream(bus: ServerBus, run: str, stream: str, producer: str) -> StreamStatus:
    return unless_other_type(lambda: _entries(bus, run, stream, producer), StreamStatus(stream, producer, 0, NO_STREAM, []))


def _entries(bus: ServerBus, run: str, stream: str, producer: str) -> StreamStatus:
    key = keys.entries(run, stream, producer)
    if not bus.client.exists(key):
        note = read_id(unless_other_type(lambda: bus.client.get(keys.last(run, stream, producer)), b""))
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
    if first:  # what was trimmed before it will never be delivered
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
