"""A producer of a stream on a server: started in a new epoch, written to without waiting, and kept small."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from esper.bus.config import ServerConfig
from esper.bus.protocol import parse_id
from esper.bus.server import keys
from esper.bus.server.connection import Client
from esper.bus.server.outbox import Outbox
from esper.bus.server.sender import Sender
from esper.errors import UserError
from esper.messages import Message

CLOSE_S = 5.0  # how long closing waits for the server before the rest goes to disk
TRIM_S = 2.0
UNANNOUNCED = "somebody else uses a key of the bus, so readers do not learn of {name!r} of the {stream}: {problem}"


class ServerProducer:
    """A producer of one stream; ``publish`` appends to a queue in memory."""

    def __init__(self, sender: Sender, outbox: Outbox, urgent: bool) -> None:
        self._sender, self._outbox, self._urgent = sender, outbox, urgent
        self.epoch = outbox.epoch

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        """Queue for the sender thread; raises Fenced once the server has seen a newer start of this producer."""
        self._outbox.put(message, after)
        self._sender.wake(self._urgent)

    @property
    def waiting(self) -> int:
        """Messages published, or left by an earlier start, that the server has not confirmed."""
        return self._outbox.waiting

    @property
    def fenced(self) -> str:
        """Why nothing more may be published, in a sentence; empty while it may."""
        return self._outbox.fenced

    def send(self, message: Message, timeout_s: float) -> bool:
        """Publish and wait until it is stored; for programs that have nothing else to do meanwhile."""
        self._outbox.put(message, ())
        self._sender.send_now()
        return not self._outbox.waiting or self.flush(timeout_s)

    def barrier(self, timeout_s: float) -> bool:
        """Make everything published survive this process and a server that then loses its tail; whether it is there.

        Messages that the server has not confirmed after ``timeout_s`` seconds are put on disk (at once if it counts as gone), and so
        are those that it confirmed last.
        """
        stored = self.flush(timeout_s if not self._sender.open else 0.0)
        self._outbox.to_disk()
        return stored

    def flush(self, timeout_s: float) -> bool:
        """Wait until the server has everything, at most ``timeout_s`` seconds; whether it has."""
        deadline = time.monotonic() + timeout_s
        with self._outbox.settled:
            while self._outbox.waiting and not self._outbox.fenced:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._sender.wake(urgent=True)
                self._outbox.settled.wait(min(left, 0.1))
        return not self._outbox.fenced

    def close(self) -> None:
        """Flush; the queue itself is released with the bus."""
        self.flush(CLOSE_S if not self._sender.open else 0.0)


def new_epoch(client: Client, stream: str, run: str, name: str, note: Path, incident: Callable[[str, str], None]) -> int:
    """One more than any start of this producer before, by the server's count and by our own ``note`` of the last.

    Raises UserError for a note that is damaged, and redis errors.
    """
    lowest = 1 + _epoch_in(note)
    named = [keys.epoch(run, stream, name), keys.RUNS, keys.producers(run, stream)]
    epoch: int
    epoch, problem = client.register_script(keys.START)(keys=named, args=[run, name, lowest])
    if problem:
        incident("bus_key", UNANNOUNCED.format(name=name, stream=stream, problem=problem.decode(errors="replace")))
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(str(epoch))
        file.flush()
        os.fsync(file.fileno())  # else the machine may go down between the two and leave an empty note
    partial.replace(note)
    return epoch


def _epoch_in(note: Path) -> int:
    """The last epoch that a producer noted, 0 where there is none. Raises UserError for a note that is damaged."""
    if not note.exists():
        return 0
    text = note.read_text(encoding="utf-8", errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{note} is damaged: it holds {text[:20]!r} instead of a whole number, by which the bus tells this start of the run from "
            "earlier ones. Write a number into it that is larger than how often the run was started (1000 will do), and go on."
        )
    return int(text)


class Trimmer:
    """Looks at the watched streams every TRIM_S seconds; called from the sender thread."""

    def __init__(self, client: Client, config: ServerConfig) -> None:
        self._client, self._limit = client, config.keep_mb << 20
        self._keys: list[str] = []
        self._next = 0.0

    def watch(self, key: str) -> None:
        """Keep this stream small."""
        self._keys.append(key)

    def work(self) -> None:
        """Trim the streams that are larger than ``bus.keep_mb``; a server that is away is left for later."""
        import redis

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + TRIM_S
        try:
            for key in self._keys:
                if (self._client.memory_usage(key) or 0) > self._limit:
                    self.trim(key)
        except redis.RedisError:  # not needed now; the sender itself notices and reports a server that is gone
            return

    def trim(self, key: str) -> None:
        """Remove the entries that every group has acknowledged; a stream without groups is kept whole.

        The last entry stays, as a sign that there were others: a reader must notice that the beginning is gone.
        """
        floors = []
        for group in self._client.xinfo_groups(key):
            pending = self._client.xpending(key, group["name"])
            floors.append(parse_id(pending["min"] or group["last-delivered-id"]))
        if floors and min(floors) > (0, 0):
            epoch, sequence = min(floors)
            self._client.xtrim(key, minid=f"{epoch}-{sequence}", approximate=False)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
