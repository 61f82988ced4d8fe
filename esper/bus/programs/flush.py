"""``esper bus flush <run folder>``: send the messages that ended processes of a run left on disk, once its server answers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from esper.bus import open_bus
from esper.bus.codec import Refused, decode
from esper.bus.config import EmbeddedConfig
from esper.bus.discovery import KINDS, invitation
from esper.bus.protocol import STREAMS, Fenced, Id, parse_id
from esper.bus.server import keys
from esper.bus.server.bus import SPOOL, ServerBus
from esper.bus.server.connection import readable
from esper.bus.server.spool import left_in, lock_folder
from esper.errors import UserError

if TYPE_CHECKING:
    from esper.bus.server.bus import ServerBus


IN_TURN = ("telemetry", "acks", "commands", "events")  # a reader that sees the end of a tick must find the messages before it
LOOK_S = 0.5


@dataclass(frozen=True)
class Leftover:
    """The messages that one producer left: its stream, run and name, the ids of its messages, and their folder."""

    stream: str
    run: str
    producer: str
    ids: list[Id]
    folder: Path


def leftovers(spool: Path) -> list[Leftover]:
    """The messages under a bus's spool folder, in the order in which they must be sent; nothing is changed there."""
    found = [left for folder in sorted(spool.glob("*")) if folder.is_dir() and (left := _left(folder))]
    return sorted(found, key=lambda left: IN_TURN.index(left.stream))


def _left(folder: Path) -> Leftover | None:
    """The messages in ``folder``, which name their producer themselves, since a name may have dots in it. None where none is readable."""
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


def send(bus: ServerBus, left: Leftover, patience_s: float, progress: Callable[[int], None] = lambda waiting: None) -> int:
    """Send them under their own ids, so that none is doubled; how many still wait afterwards.

    Gives up when the server has taken nothing for ``patience_s`` seconds; ``progress`` is told now and then how many wait.
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
            progress(waiting)
        elif time.monotonic() - since > patience_s:
            return now
    return 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("folder", type=Path, help="output folder of the run")
    parser.add_argument("--patience", type=float, default=30.0, metavar="S", help="give up when the server took nothing for so long")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def flush(options: argparse.Namespace) -> int:
    """Send it all; 0 when everything is on the server, 1 when something still waits.

    The server of ``bus=embedded`` ended with its run: it is started for this and ended again, and keeps its data.
    Raises UserError for a folder that is no run's, a run that is at work, or a server that does not answer.
    """
    import redis

    if not options.patience > 0:
        raise UserError(f"--patience {options.patience:g}: give a number of seconds above 0")
    folder = options.folder.resolve()
    found = invitation(folder)
    waiting = leftovers(folder / "bus" / SPOOL)
    for left in waiting:
        lock_folder(left.folder, alone=True).close()  # before a server is started under one that is at work
    if not waiting:
        return _said(options, f"nothing waits in {folder / 'bus' / SPOOL}", 0, 0)
    config = KINDS[found.bus["name"]](**found.bus)
    with closing(open_bus(config, folder)) as bus:
        assert isinstance(bus, ServerBus)
        try:
            sent, unsent = _send(bus, waiting, options.patience)
        except redis.RedisError as error:
            raise readable(bus.address, error) from None
        where = f"{bus.address!r}" + (", whose data stay in the run's folder" if isinstance(config, EmbeddedConfig) else "")
        sentence = f"{sent} messages sent to {where}" + (f"; {unsent} still wait" if unsent else ": all that was said is there")
        return _said(options, sentence, sent, unsent)


def _send(bus: ServerBus, waiting: list[Leftover], patience_s: float) -> tuple[int, int]:
    """How many messages the server was given that it did not have, and how many wait still."""
    sent = unsent = 0
    for left in waiting:
        new = missing(bus, left)
        rest = min(send(bus, left, patience_s), new)
        sent, unsent = sent + new - rest, unsent + rest
    return sent, unsent


def _said(options: argparse.Namespace, sentence: str, sent: int, unsent: int) -> int:
    if options.json:
        sys.stdout.write(msgspec.json.encode({"sent": sent, "waiting": unsent}).decode() + "\n")
    else:
        print(sentence)
    return int(unsent > 0)
