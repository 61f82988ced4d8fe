"""What ended processes of a run left on disk for the server, and sending it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from esper.bus.codec import Refused, decode
from esper.bus.protocol import STREAMS, Fenced, Id, parse_id
from esper.bus.server import keys
from esper.bus.server.spool import left_in

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus

IN_TURN = ("telemetry", "acks", "commands", "events")  # who sees the end of a tick finds what was said before it
LOOK_S = 0.5


@dataclass(frozen=True)
class Leftover:
    """What one producer left: its stream, run and name, the ids of its messages, and the folder they lie in."""

    stream: str
    run: str
    producer: str
    ids: list[Id]
    folder: Path


def leftovers(spool: Path) -> list[Leftover]:
    """What waits under a bus's spool folder, in the order in which it is to be sent; nothing is changed there."""
    found = [left for folder in sorted(spool.glob("*")) if folder.is_dir() and (left := _left(folder))]
    return sorted(found, key=lambda left: IN_TURN.index(left.stream))


def _left(folder: Path) -> Leftover | None:
    """Whose messages these are is said by the messages: a name may have dots in it. None where none can be read."""
    ids, named = [], None
    for epoch, sequence, wire in left_in(folder):
        ids.append((epoch, sequence))
        named = named or _named(folder, wire)
    return Leftover(*named, ids, folder) if named else None


def _named(folder: Path, wire: bytes) -> tuple[str, str, str] | None:
    try:
        envelope = decode(wire)
    except Refused:  # a damaged record names nobody; the next one may
        return None
    for stream in STREAMS:
        if folder.name == f"{quote(envelope.run, safe='')}.{stream}.{quote(envelope.producer, safe='')}":
            return stream, envelope.run, envelope.producer
    return None


def missing(bus: ServerBus, left: Leftover) -> int:
    """How many of these the server does not have yet: among them are those that it confirmed last."""
    last = parse_id(bus.client.get(keys.last(left.run, left.stream, left.producer)) or b"0-0")
    return sum(id > last for id in left.ids)


def send(bus: ServerBus, left: Leftover, patience_s: float, said: Callable[[int], None] = lambda waiting: None) -> int:
    """Send it under its own ids, so that what is there already is not doubled; how many wait when this returns.

    Gives up when the server has taken nothing for ``patience_s`` seconds; ``said`` is told now and then how many wait.
    Raises UserError where a process is at work under this name, Fenced when one has started meanwhile.
    """
    producer = bus.producer(left.stream, left.run, left.producer, alone=True)
    waiting, since = producer.waiting, time.monotonic()
    while not producer.flush(LOOK_S):
        if producer.fenced:
            raise Fenced(producer.fenced)
        now = producer.waiting
        if now != waiting:
            waiting, since = now, time.monotonic()
            said(waiting)
        elif time.monotonic() - since > patience_s:
            return now
    return 0
