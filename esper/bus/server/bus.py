"""The Bus protocol over one server: producers share a sender thread, consumers have a connection each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from esper.bus.codec import Envelope, Refused, decode
from esper.bus.config import ServerConfig
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import STREAMS, Counts, DeadLetter
from esper.bus.server import keys
from esper.bus.server.connection import Address, Entry, Fields, connect, readable, unless_other_type
from esper.bus.server.consumer import RETRIES, ServerConsumer
from esper.bus.server.outbox import Outbox
from esper.bus.server.payloads import Payloads, load_payload, store_if_large
from esper.bus.server.producer import CLOSE_S, ServerProducer, Trimmer, new_epoch
from esper.bus.server.sender import Sender
from esper.bus.server.spool import Spool, lock_folder
from esper.messages import ClaimCheck, Message

log = logging.getLogger(__name__)

FOLLOW_S = 0.1
SPOOL = "spool"  # folder of waiting messages, in the bus's folder
LOST = ("dropped", "gaps", "duplicates", "dead_letters", "spool_bytes")  # losses of readers in this process count as well
UNSENT = (
    "{count} messages did not reach the bus server at {address!r}: they wait in {spool}, and `esper bus flush {folder}` sends them"
    " when the server answers, as does the run when it goes on"
)
DROPPED = "{count} messages for the bus server are lost, since there was no room for them (bus.spool_mb={room})"


class ServerBus:
    """Streams on a Redis-protocol server; ``folder`` holds the spool and large payloads."""

    def __init__(self, config: ServerConfig, address: Address, folder: Path) -> None:
        import redis

        self.config, self.address, self.folder = config, address, folder
        self.counters = Counts()
        self.incidents: deque[tuple[str, str]] = deque(maxlen=1000)
        self.client = connect(address, config.timeout_s, RETRIES)
        try:
            self.client.ping()
        except redis.RedisError as error:
            raise readable(address, error) from None
        self._replay = self.client.register_script(keys.REPLAY)
        self._local: MemoryBus | None = None
        self._outboxes: list[Outbox] = []
        self._locks: list[IO[bytes]] = []
        self._closed = False
        self._trimmer = Trimmer(connect(address, config.timeout_s), config)
        self.sender = Sender(connect(address, config.timeout_s), config, self.counters, self._incident)
        self.sender.after_round(self._trimmer.work)

    def _incident(self, code: str, sentence: str) -> None:
        self.incidents.append((code, sentence))

    @property
    def local(self) -> MemoryBus:
        """A bus in memory beside the server, on which the parts of this process meet without it."""
        if self._local is None:
            self._local = MemoryBus(self.config, self.folder)
        return self._local

    @property
    def reachable(self) -> bool:
        """Whether the server answers, as far as the sender thread knows."""
        return not self.sender.open

    def each_round(self, chore: Callable[[], None]) -> None:
        """Call ``chore`` from the sender thread, several times a second, before anything is sent."""
        self.sender.each_round(chore)

    def send_now(self) -> None:
        """Send waiting messages from the calling thread."""
        self.sender.send_now()

    def producer(self, stream: str, run: str, name: str = "main", alone: bool = False) -> ServerProducer:
        """The producer ``name`` of a stream in a new epoch; messages that an earlier process left on disk are sent first.

        Raises UserError where ``alone`` is asked for and another process writes under this name, or has asked for it.
        """
        import redis

        assert stream in STREAMS, stream
        spool_folder = self.folder / SPOOL / f"{quote(run, safe='')}.{stream}.{quote(name, safe='')}"
        spool_folder.mkdir(parents=True, exist_ok=True)
        self._locks.append(lock_folder(spool_folder, alone))
        try:
            epoch = new_epoch(self.client, stream, run, name, spool_folder / "epoch", self._incident)
        except redis.RedisError as error:
            raise readable(self.address, error) from None
        spool = Spool(spool_folder, self.config.spool_mb << 20, self.config.drop)
        outbox = Outbox(run, name, epoch, self.config, spool, self.counters, self._seal)
        self._outboxes.append(outbox)
        self.sender.add(outbox, stream)
        self._trimmer.watch(keys.entries(run, stream, name))
        return ServerProducer(self.sender, outbox, urgent=stream in ("commands", "acks"))

    def _seal(self, wire: bytes, envelope: Envelope) -> bytes:
        return store_if_large(self.folder / "payloads", wire, envelope)

    def consumer(self, stream: str, run: str, group: str, name: str) -> ServerConsumer:
        """A member of a consumer group over all producers of a stream."""
        assert stream in STREAMS, stream
        return ServerConsumer(
            self.address,
            self.config,
            self.counters,
            self.folder / "payloads",
            stream,
            run,
            group,
            name,
            self._incident,
        )

    def dead_letters(self, run: str) -> list[DeadLetter]:
        """The dead letters, oldest first."""
        return [self._letter(id.decode(), fields) for id, fields in self._dead(run)]

    def _dead(self, run: str) -> list[Entry]:
        return unless_other_type(lambda: self.client.xrange(keys.dead(run)), [])

    def _letter(self, id: str, fields: Fields) -> DeadLetter:
        def text(name: bytes) -> str:
            return fields.get(name, b"").decode(errors="replace")

        message: Message | None
        try:
            envelope = decode(fields.get(b"m", b""))
            if isinstance(envelope.body, ClaimCheck):
                envelope = load_payload(self.folder / "payloads", envelope)
            message = envelope.body
        except Refused:
            message = None
        return DeadLetter(
            id=id,
            stream=text(b"stream"),
            producer=text(b"producer"),
            origin=text(b"origin"),
            group=text(b"group"),
            deliveries=int(text(b"deliveries")) if fields.get(b"deliveries", b"").isdigit() else 0,
            reason=text(b"reason"),
            message=message,
        )

    def replay(self, run: str, ids: list[str]) -> int:
        """Hand dead letters to their group once more, with a fresh delivery count; each moves atomically.

        A letter that names no group of a stream, since it was never handed out or is not ours, stays.
        """
        moved = 0
        for id, fields in self._dead(run):
            goes_to = keys.names([fields.get(b"stream", b""), fields.get(b"group", b"")])
            if id.decode() not in ids or len(goes_to) < 2 or not all(goes_to):
                continue
            target = keys.replays(run, fields[b"stream"].decode(), fields[b"group"].decode())
            kept: list[Any] = [id]
            for name in (b"m", b"producer", b"origin"):
                kept += (name, fields.get(name, b""))
            moved += self._replay(keys=[keys.dead(run), target], args=kept)
        return moved

    def purge(self, run: str, ids: list[str]) -> int:
        """Forget dead letters, and remove their stored payloads where no group needs these."""
        chosen = [(id, fields) for id, fields in self._dead(run) if id.decode() in ids]
        purged = self.client.xdel(keys.dead(run), *(id for id, _ in chosen)) if chosen else 0
        for _, fields in chosen:
            self.payloads(run).discard_letter(fields)
        return purged

    def payloads(self, run: str) -> Payloads:
        """The stored payloads of a run."""
        return Payloads(self.client, self.folder / "payloads", run)

    def runs(self) -> list[str]:
        """Names of all runs on the server."""
        return keys.names(unless_other_type(lambda: self.client.smembers(keys.RUNS), frozenset()))

    def streams(self, run: str, stream: str) -> list[str]:
        """Keys of the streams of all producers."""
        return [keys.entries(run, stream, name) for name in self.producers(run, stream)]

    def producers(self, run: str, stream: str) -> list[str]:
        """Names of all producers of a stream."""
        return keys.names(unless_other_type(lambda: self.client.smembers(keys.producers(run, stream)), frozenset()))

    def is_stream(self, key: str) -> bool:
        """Whether this key holds a stream; it may hold nothing, or something foreign."""
        return unless_other_type(lambda: bool(self.client.exists(key)) and self.client.xlen(key) >= 0, False)

    def newest(self, stream: str, run: str, count: int, follow: bool) -> Iterator[tuple[str, str, Envelope]]:
        """The newest ``count`` messages of every producer and, with ``follow``, all later ones; no group takes part."""
        stands: dict[str, str] = {}
        while True:
            yield from self.unread(stream, run, stands, count)
            if not follow:
                return
            time.sleep(FOLLOW_S)

    def unread(self, stream: str, run: str, stands: dict[str, str], newest: int = 0) -> Iterator[tuple[str, str, Envelope]]:
        """The next messages of every producer, a thousand at most, behind the ids in ``stands``, which moves on; no group takes part.

        Of a producer that is not in ``stands`` the ``newest`` messages come first, or where that is 0 the first ones that are left.
        """
        for name in self.producers(run, stream):
            stand = stands.get(name, None if newest else "0-0")
            for id, fields in self._newer(keys.entries(run, stream, name), stand, newest):
                stands[name] = id.decode()
                try:
                    yield name, id.decode(), decode(fields.get(b"m", b""))
                except Refused:
                    continue  # dead letters show it

    def _newer(self, key: str, last: str | None, count: int) -> list[Entry]:
        """The entries of a stream after ``last``, or its newest ``count``; none where the key is no stream."""
        none: list[Entry] = []
        if last is not None:
            return unless_other_type(lambda: self.client.xrange(key, f"({last}", "+", 1000), none)
        return unless_other_type(lambda: self.client.xrevrange(key, count=count), none)[::-1]

    def counts(self) -> dict[str, int]:
        """Counters of this process, with ``spool_bytes`` and ``waiting`` (published, not confirmed).

        They include the losses and the disk space of the bus in memory beside the server: a message that was dropped on its way to
        the server and on its way to a reader in this process counts twice.
        """
        counts = self.counters.snapshot() | {
            "spool_bytes": sum(outbox.spool_bytes for outbox in self._outboxes),
            "waiting": sum(outbox.waiting for outbox in self._outboxes),
        }
        if self._local is not None:
            beside = self._local.counts()
            counts |= {name: counts[name] + beside[name] for name in LOST}
        return counts

    def close(self) -> None:
        """Send waiting messages for at most CLOSE_S seconds; a warning counts the rest, which the next start sends from disk."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + CLOSE_S
        for outbox in self._outboxes:
            while outbox.waiting and not outbox.fenced and not self.sender.open and time.monotonic() < deadline:
                self.sender.wake(urgent=True)
                with outbox.settled:
                    outbox.settled.wait(0.05)
        self.sender.stop()
        for outbox in self._outboxes:
            outbox.to_disk()
            outbox.close()
        for held in self._locks:
            held.close()
        self._say_what_is_left()
        self._trimmer.close()
        self.client.close()
        if self._local is not None:
            self._local.close()

    def _say_what_is_left(self) -> None:
        """Warn about unsent messages; training does not wait for the server, so the user learns of them only at its end."""
        if unsent := sum(outbox.waiting for outbox in self._outboxes if not outbox.fenced):
            spool = self.folder / SPOOL
            log.warning(UNSENT.format(count=unsent, address=self.address, spool=spool, folder=self.folder.parent))
        if dropped := self.counters.snapshot()["dropped"]:
            log.warning(DROPPED.format(count=dropped, room=self.config.spool_mb))
