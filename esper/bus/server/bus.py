"""The Bus protocol over one server: producers share a writer thread, consumers have a connection each."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from esper.bus.codec import Envelope, Refused, decode
from esper.bus.config import EmbeddedConfig, ServerConfig
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import STREAMS, Counts, DeadLetter
from esper.bus.server import keys, scripts
from esper.bus.server.claim_check import check_in, check_out
from esper.bus.server.connection import Address, connect, readable, unless_other_type
from esper.bus.server.consumer import ServerConsumer
from esper.bus.server.embedded import EmbeddedServer
from esper.bus.server.outbox import Outbox
from esper.bus.server.payloads import Payloads
from esper.bus.server.sender import Writer
from esper.bus.server.spool import Spool, claim
from esper.bus.server.trimming import Trimmer
from esper.errors import UserError
from esper.messages import ClaimCheck, Message

log = logging.getLogger(__name__)

RETRIES = 5
FOLLOW_S = 0.1
SPOOL = "spool"  # where what waits lies, in the bus's folder
CLOSE_S = 5.0  # how long closing waits for the server before what is left goes to disk
LOST = ("dropped", "gaps", "duplicates", "dead_letters", "spool_bytes")  # what readers in this process lost counts as well
UNSENT = (
    "{count} messages did not reach the bus server at {address!r}: they wait in {spool}, and `esper bus flush {folder}` sends them"
    " when the server answers, as does the run when it goes on"
)
UNANNOUNCED = "somebody else uses a key of the bus, so readers do not learn of {name!r} of the {stream}: {problem}"
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
        self._start = self.client.register_script(scripts.START)
        self._replay = self.client.register_script(scripts.REPLAY)
        self._local: MemoryBus | None = None
        self._outboxes: list[Outbox] = []
        self._claims: list[IO[bytes]] = []
        self._closed = False
        self._trimmer = Trimmer(connect(address, config.timeout_s), config)
        self.writer = Writer(connect(address, config.timeout_s), config, self.counters, self._incident)
        self.writer.after_round(self._trimmer.work)

    def _incident(self, code: str, sentence: str) -> None:
        self.incidents.append((code, sentence))

    @property
    def local(self) -> MemoryBus:
        """A bus in memory beside the server, on which the parts of this process meet without it."""
        if self._local is None:
            self._local = MemoryBus(self.config, self.folder)
        return self._local

    def producer(self, stream: str, run: str, name: str = "main", alone: bool = False) -> ServerProducer:
        """The writer ``name`` of a stream in a new epoch; what an earlier process left on disk is sent first.

        Raises UserError where ``alone`` is asked for and another process writes under this name, or has asked for it.
        """
        assert stream in STREAMS, stream
        spool_folder = self.folder / SPOOL / f"{quote(run, safe='')}.{stream}.{quote(name, safe='')}"
        spool_folder.mkdir(parents=True, exist_ok=True)
        self._claims.append(claim(spool_folder, alone))
        epoch = self._new_epoch(stream, run, name, spool_folder / "epoch")
        spool = Spool(spool_folder, self.config.spool_mb << 20, self.config.drop)
        outbox = Outbox(run, name, epoch, self.config, spool, self.counters, self._seal)
        self._outboxes.append(outbox)
        self.writer.add(outbox, stream)
        self._trimmer.watch(keys.entries(run, stream, name))
        return ServerProducer(self, outbox, urgent=stream in ("commands", "acks"))

    def _new_epoch(self, stream: str, run: str, name: str, note: Path) -> int:
        """One more than any before, by the server's count and by our own note of the last."""
        import redis

        lowest = 1 + _epoch_in(note)
        named = [keys.epoch(run, stream, name), keys.RUNS, keys.producers(run, stream)]
        try:
            epoch, problem = self._start(keys=named, args=[run, name, lowest])
        except redis.RedisError as error:
            raise readable(self.address, error) from None
        if problem:
            self._incident("bus_key", UNANNOUNCED.format(name=name, stream=stream, problem=problem.decode(errors="replace")))
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(str(epoch))
            file.flush()
            os.fsync(file.fileno())  # else the machine may go down between the two and leave an empty note
        partial.replace(note)
        return epoch

    def _seal(self, wire: bytes, envelope: Envelope) -> bytes:
        return check_in(self.folder / "payloads", wire, envelope)

    def consumer(self, stream: str, run: str, group: str, name: str) -> ServerConsumer:
        """A member of a consumer group over all producers of a stream."""
        assert stream in STREAMS, stream
        return ServerConsumer(
            connect(self.address, self.config.timeout_s),
            connect(self.address, self.config.timeout_s, RETRIES),
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
        """What was given up on, oldest first."""
        return [self._letter(id.decode(), fields) for id, fields in self._dead(run)]

    def _dead(self, run: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return unless_other_type(lambda: self.client.xrange(keys.dead(run)), [])

    def _letter(self, id: str, fields: dict[bytes, bytes]) -> DeadLetter:
        def text(name: bytes) -> str:
            return fields.get(name, b"").decode(errors="replace")

        message: Message | None
        try:
            envelope = decode(fields.get(b"m", b""))
            if isinstance(envelope.body, ClaimCheck):
                envelope = check_out(self.folder / "payloads", envelope)
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

        What names no group of a stream, since it was never handed out or is nothing that we wrote, stays where it is.
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
        return keys.names(unless_other_type(lambda: self.client.smembers(keys.RUNS), set()))

    def streams(self, run: str, stream: str) -> list[str]:
        """Keys of the streams of all producers."""
        names = keys.names(self._members(run, stream))
        return [keys.entries(run, stream, name) for name in names]

    def _members(self, run: str, stream: str) -> set[bytes]:
        return unless_other_type(lambda: self.client.smembers(keys.producers(run, stream)), set())

    def is_stream(self, key: str) -> bool:
        """Whether a stream is under this key: nothing, or something of somebody else's, may be."""
        return unless_other_type(lambda: bool(self.client.exists(key)) and self.client.xlen(key) >= 0, False)

    def newest(self, stream: str, run: str, count: int, follow: bool) -> Iterator[tuple[str, str, Envelope]]:
        """The newest ``count`` messages of every producer, then, with ``follow``, what comes; no group takes part."""
        stands: dict[str, str] = {}
        while True:
            for name in keys.names(self._members(run, stream)):
                for id, fields in unless_other_type(partial(self._since, keys.entries(run, stream, name), stands.get(name), count), []):
                    stands[name] = id.decode()
                    try:
                        yield name, id.decode(), decode(fields.get(b"m", b""))
                    except Refused:
                        continue  # dead letters show it
            if not follow:
                return
            time.sleep(FOLLOW_S)

    def _since(self, key: str, last: str | None, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """What a stream has after ``last``, or its newest ``count`` entries."""
        if last is not None:
            return self.client.xrange(key, f"({last}", "+", 1000)
        return self.client.xrevrange(key, count=count)[::-1]

    def counts(self) -> dict[str, int]:
        """Counters of this process, with ``spool_bytes`` and ``waiting`` (published, not confirmed).

        What the bus in memory beside the server lost, and what it holds on disk, is in them: a message that was dropped
        on its way to the server and on its way to a reader in this process counts twice.
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
        """Send what waits, for at most CLOSE_S seconds; the rest goes to disk, which is said, and is sent by the next start."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + CLOSE_S
        for outbox in self._outboxes:
            while outbox.waiting and not outbox.fenced and not self.writer.open and time.monotonic() < deadline:
                self.writer.wake(urgent=True)
                with outbox.settled:
                    outbox.settled.wait(0.05)
        self.writer.stop()
        for outbox in self._outboxes:
            outbox.to_disk()
            outbox.close()
        for held in self._claims:
            held.close()
        self._say_what_is_left()
        self._trimmer.close()
        self.client.close()
        if self._local is not None:
            self._local.close()

    def _say_what_is_left(self) -> None:
        """Training does not wait for the server, so its end is the first moment at which somebody must be told."""
        if unsent := sum(outbox.waiting for outbox in self._outboxes if not outbox.fenced):
            spool = self.folder / SPOOL
            log.warning(UNSENT.format(count=unsent, address=self.address, spool=spool, folder=self.folder.parent))
        if dropped := self.counters.snapshot()["dropped"]:
            log.warning(DROPPED.format(count=dropped, room=self.config.spool_mb))


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


class ServerProducer:
    """The single writer of one stream; ``publish`` appends to a queue in memory."""

    def __init__(self, bus: ServerBus, outbox: Outbox, urgent: bool) -> None:
        self._bus, self._outbox, self._urgent = bus, outbox, urgent
        self.epoch = outbox.epoch

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        """Queue for the writer thread; raises Fenced once the server has seen a newer start of this producer."""
        self._outbox.put(message, after)
        self._bus.writer.wake(self._urgent)

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
        self._bus.writer.send_now()
        return not self._outbox.waiting or self.flush(timeout_s)

    def barrier(self, timeout_s: float) -> bool:
        """Make everything published survive this process and a server that then loses its tail; whether it is there.

        What the server has not confirmed after ``timeout_s`` seconds, or at once where it counts as gone, is put on disk, and so is
        what it confirmed last.
        """
        stored = self.flush(timeout_s if not self._bus.writer.open else 0.0)
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
                self._bus.writer.wake(urgent=True)
                self._outbox.settled.wait(min(left, 0.1))
        return not self._outbox.fenced

    def close(self) -> None:
        """Flush; the queue itself is released with the bus."""
        self.flush(CLOSE_S if not self._bus.writer.open else 0.0)


class EmbeddedBus(ServerBus):
    """A ServerBus that starts its own server and stops it in the end."""

    def __init__(self, config: EmbeddedConfig, folder: Path) -> None:
        self.server = EmbeddedServer(folder / "server", config.port)
        super().__init__(config, self.server.address, folder)

    def close(self) -> None:
        """Close the bus, then stop the server."""
        super().close()
        self.server.stop()
