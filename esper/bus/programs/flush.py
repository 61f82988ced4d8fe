"""``esper bus flush <run folder>``: send what a run could not, once its server answers again."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

import msgspec

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig
from esper.bus.discovery import KINDS, invitation
from esper.bus.server.bus import SPOOL, ServerBus
from esper.bus.server.connection import readable
from esper.bus.server.leftover_spool import Leftover, leftovers, missing, send
from esper.bus.server.spool import claim
from esper.errors import UserError


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
        claim(left.folder, alone=True).close()  # before a server is started under one that is at work
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
