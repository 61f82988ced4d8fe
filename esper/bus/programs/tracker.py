"""``esper track <run folder>``: the run's trackers in their own process, which may be killed and restarted.

Every start reads the run from its beginning in a consumer group of its own and writes all sinks anew, replacing the work of an earlier
life, so that a kill leaves neither hole nor double. The server therefore has to hold all messages of the run (``bus.keep_mb``).
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from esper.bus.discovery import joined
from esper.bus.protocol import counts_in_words, parse_id
from esper.bus.server import keys
from esper.bus.server.bus import ServerBus
from esper.bus.server.payloads import RELEASED, kept, released
from esper.errors import UserError
from esper.messages import Message, RunEnded, RunStarted

GROUP = "tracker-"
_ours = re.compile(rb"tracker-([0-9]{1,9})")


def fresh_group(bus: ServerBus, run: str, streams: Sequence[str]) -> str:
    """A consumer group for this start, in place of the one of an earlier start.

    Raises UserError when the server, or the folder of large messages, no longer has the run from its beginning.
    """
    if released(bus.folder / "payloads"):
        raise UserError(RELEASED.format(run=run))
    started = 0
    for stream in streams:
        for key in filter(bus.is_stream, bus.streams(run, stream)):
            first = bus.client.xrange(key, count=1) if key == keys.entries(run, stream, "main") else []  # the trainer's
            if first and parse_id(first[0][0])[1] > 1:
                raise UserError(
                    f"the server let go of the beginning of run {run} (bus.keep_mb={bus.config.keep_mb}), so what was"
                    " tracked cannot be written anew: the parts kept so far stay in the run's folder"
                )
            for group in bus.client.xinfo_groups(key):  # an empty stream may have one
                if number := _ours.fullmatch(group["name"]):
                    started = max(started, int(number[1]))
                    bus.client.xgroup_destroy(key, group["name"])
    return f"{GROUP}{started + 1}"


def _let_go(bus: ServerBus, run: str) -> None:
    """No start after this one needs the large messages; a server that ended with its run has had them removed."""
    import redis

    payloads = bus.payloads(run)
    try:
        if kept(payloads.folder):
            payloads.release()
    except redis.RedisError as error:
        if kept(payloads.folder):
            print(f"the large messages of {run} stay in {payloads.folder}, since its server is gone: {error}", file=sys.stderr)


class _Ending:
    """A tracker that only notices how the run ended."""

    wants_model = False

    def __init__(self) -> None:
        self.over = threading.Event()
        self.status = "KILLED"

    def open(self, record: object) -> None:
        """Nothing to prepare."""

    def record(self, messages: Sequence[Message]) -> None:
        """Look for the last event."""
        for message in messages:
            if isinstance(message, RunEnded):
                self.status = message.status
                self.over.set()
            elif isinstance(message, RunStarted):  # the run was resumed
                self.over.clear()

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self, status: str, summary: object) -> None:
        """Nothing to end."""


def main(argv: Sequence[str]) -> int:
    """Track the run in a folder until it ends; 0 when everything was kept."""
    parser = argparse.ArgumentParser(prog="esper track", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of a run with tracking.process=external")
    options = parser.parse_args(list(argv))
    from esper.config import build_group
    from esper.tracking import RunInfo, TrackerRunner, build_trackers, trackers_in
    from esper.tracking.tracker_thread import STREAMS

    with joined(options.folder.resolve(), "tracking") as (bus, found):
        info = msgspec.convert(found.info, RunInfo)
        config = build_group("tracking", info.config["tracking"])
        names = ",".join(one.name for one in trackers_in(config))
        ending = _Ending()
        group = fresh_group(bus, found.run, STREAMS)
        runner = TrackerRunner(bus, info, [*build_trackers(config), ending], group=group)
        print(f"tracking {found.run} with tracking={names}", file=sys.stderr, flush=True)
        runner.start()
        while runner.error is None:
            if ending.over.wait(0.5) and runner.drain() and ending.over.is_set():  # and it was not resumed since
                break
        runner.close(ending.status)
        if ending.status == "FINISHED":
            _let_go(bus, found.run)
        print(f"the run ended: {ending.status}; {counts_in_words(bus.counts())}", file=sys.stderr)
    return 0
