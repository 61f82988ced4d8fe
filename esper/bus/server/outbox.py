"""The messages of one producer that the server has not confirmed, and the position of its stream on the server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from esper.bus.codec import Envelope, Refused, decode, encode
from esper.bus.config import ServerConfig
from esper.bus.protocol import Counts, Fenced, Id, id_text, parse_id, read_id
from esper.bus.server import keys
from esper.bus.server.connection import Client, unless_other_type
from esper.bus.server.spool import Spool
from esper.bus.telemetry_codec import pack
from esper.messages import Message, Telemetry

BATCH = 64
BATCH_BYTES = 256 << 10  # a batch keeps the server from everybody else while it is stored
LARGE = 64 << 10  # bytes from which a message goes alone
WINDOW_BYTES = 32 << 20

Sealed = Callable[[bytes, Envelope], bytes]  # replaces the bytes of a large message by those of its claim check


class Outbox:
    """The queue between a producer, whose ``put`` never waits for the network, and the sender thread.

    Newest messages are in memory; when that fills up the oldest of them move to the spool; ``sending`` has those handed
    to the server without an answer yet, and ``window`` those it confirmed last, to be sent again if it lost its tail. At
    every moment at which both locks are free, each message is in one of these places or among those being packed.
    """

    def __init__(self, run: str, name: str, epoch: int, config: ServerConfig, spool: Spool, counts: Counts, seal: Sealed) -> None:
        self.run, self.name, self.epoch = run, name, epoch
        self.sequence = 0
        self.last: str | None = None  # where the server's stream stands, None when it must be asked
        self.sending: deque[tuple[Id, bytes, bool]] = deque()  # the last says whether it still lies in the spool
        self.window: deque[tuple[Id, bytes]] = deque()
        self.next_check = time.monotonic() + 1.0
        self.confirmed: Id = (0, 0)
        self.fenced = ""
        self.settled = threading.Condition()
        self._config, self._spool, self._counts, self._seal = config, spool, counts, seal
        self._memory: deque[tuple[int, float, tuple[str, ...], Message, int]] = deque()
        self._lock = threading.Lock()  # held for moments: where each message is; no packing, no disk
        self._spool_lock = threading.Lock()  # taken before _lock; the spool and the order of messages in it
        self._limit = config.memory_mb << 20
        self._held = 0
        self._time = 0.0
        self._window_bytes = 0
        self._popped: list[tuple[int, float, tuple[str, ...], Message, int]] = []  # on their way into `sending`

    def put(self, message: Message, after: tuple[str, ...]) -> None:
        """Take one message; raises Fenced once the server has seen a newer start of this producer."""
        if self.fenced:
            raise Fenced(self.fenced)
        size = 200 + len(getattr(message, "data", b""))
        with self._lock:
            self.sequence += 1
            self._time = max(self._time, time.time())
            self._memory.append((self.sequence, self._time, after, message, size))
            self._held += size
            over = self._held > self._limit
        if over:  # the sender thread makes room from half the limit on; this is for when it cannot keep up
            self._spill_one("raw")

    @property
    def waiting(self) -> int:
        """Messages published and not confirmed."""
        with self._spool_lock, self._lock:
            return self._unconfirmed()

    @property
    def first(self) -> Id:
        """The id of the first message that the server has not confirmed, or of the first of this start."""
        batch = self.batch()
        return batch[0][0] if batch else (self.epoch, 1)

    def _unconfirmed(self) -> int:
        return len(self.sending) + len(self._popped) + self._spool.unread + len(self._memory)

    @property
    def spool_bytes(self) -> int:
        """Bytes on disk."""
        return self._spool.bytes_held

    @property
    def oldest(self) -> float:
        """Clock time of the oldest message still in memory, 0 when there is none."""
        try:
            return self._memory[0][1]
        except IndexError:
            return 0.0

    def spill(self) -> None:
        """Move messages to disk until memory is half full; for the sender thread."""
        while self._held > self._limit // 2:
            self._spill_one(self._config.codec)

    def _spill_one(self, codec: str) -> None:
        with self._spool_lock:
            self._spill_locked(codec)

    def _spill_locked(self, codec: str) -> None:
        with self._lock:
            if not self._memory:
                return
            item = self._memory.popleft()
            self._held -= item[4]
        dropped = self._spool.append(self.epoch, item[0], self._encode(item, codec))
        if dropped:
            self._counts.add("dropped", dropped)

    def batch(self) -> list[tuple[Id, bytes]]:
        """The messages to send next; the same ones until they are confirmed."""
        if not self.sending:
            self._fill()
        found: list[tuple[Id, bytes]] = []
        total = 0
        for id, wire, _ in self.sending:
            total += len(wire)
            if found and (len(wire) >= LARGE or len(found) == BATCH or total > BATCH_BYTES):
                break
            found.append((id, wire))
            if len(wire) >= LARGE:
                break
        return found

    def _fill(self) -> None:
        """Move the oldest messages into ``sending``, packed."""
        with self._spool_lock:
            if self._spool.unread:
                entries = self._spool.read(BATCH, BATCH_BYTES)
                with self._lock:
                    self.sending.extend(((epoch, sequence), wire, True) for epoch, sequence, wire in entries)
                return
            self._pop()
        packed = [((self.epoch, item[0]), self._encode(item, self._config.codec), False) for item in self._popped]
        with self._lock:
            self.sending.extend(packed)
            self._popped = []

    def _pop(self) -> None:
        total = 0
        with self._lock:
            while self._memory and len(self._popped) < BATCH and total < BATCH_BYTES:
                item = self._memory.popleft()
                self._popped.append(item)
                total += item[4]
            self._held -= total

    def _encode(self, item: tuple[int, float, tuple[str, ...], Message, int], codec: str) -> bytes:
        sequence, moment, after, message, _ = item
        if isinstance(message, Telemetry) and message.codec == "raw":
            message = pack(message, codec)
        envelope = Envelope(self.run, self.name, self.epoch, sequence, moment, after, message)
        return self._seal(encode(envelope), envelope)

    def confirm(self, last: Id) -> None:
        """The server has everything up to ``last``."""
        confirmed = spooled = 0
        with self._spool_lock:
            with self._lock:
                while self.sending and self.sending[0][0] <= last:
                    id, wire, on_disk = self.sending.popleft()
                    self.window.append((id, wire))
                    self._window_bytes += len(wire)
                    confirmed += 1
                    spooled += on_disk
                while len(self.window) > self._config.replay or self._window_bytes > WINDOW_BYTES:
                    self._window_bytes -= len(self.window.popleft()[1])
            if spooled:
                self._spool.release(spooled)
        self.confirmed = last
        self._counts.add("sent", confirmed)
        with self.settled:
            self.settled.notify_all()

    def rewind(self, last: Id) -> int:
        """The server lost its tail after ``last``: send again the messages that the window still has; how many it has not."""
        again = [(id, wire) for id, wire in self.window if id > last]
        if not again:
            return 0
        with self._lock:
            self.window = deque((id, wire) for id, wire in self.window if id <= last)
            self._window_bytes = sum(len(wire) for _, wire in self.window)
            self.sending.extendleft((id, wire, False) for id, wire in reversed(again))
        self._counts.add("sent", -len(again))
        first = again[0][0]
        return first[1] - 1 - (last[1] if last[0] == first[0] else 0) if not self.window else 0

    def to_disk(self) -> None:
        """Have everything unconfirmed survive the end of this process, even by a kill or a power cut.

        The window too: a server may lose its tail together with this process, and the next start gives it back.
        """
        with self._spool_lock:
            with self._lock:
                confirmed, unanswered, unpacked = list(self.window), list(self.sending), list(self._popped)
            entries = dict(confirmed) | {id: wire for id, wire, on_disk in unanswered if not on_disk}
            entries |= {(self.epoch, item[0]): self._encode(item, "raw") for item in unpacked}
            if entries:
                self._spool.keep_in_flight([(*id, wire) for id, wire in sorted(entries.items())])
            while self._memory:
                self._spill_locked(self._config.codec)
            self._spool.sync()

    def close(self) -> None:
        """Close the files of the spool; confirmed messages are left to the server from here on."""
        with self._spool_lock:
            if not self._unconfirmed():
                self._spool.forget_in_flight()
            self._spool.close()


PAGE = 500
OCCUPIED = (
    "somebody else wrote to {key}, where only this run writes, and ids of a stream only grow: delete that key, and the messages are sent"
)


class StreamPositions:
    """Asks a server where the streams of producers stand; methods raise redis errors."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._note = client.register_script(keys.NOTE)

    def find(self, outbox: Outbox, stream: str) -> Id | None:
        """The last id of the stream, all of which is the producer's; None where another process writes in its name.

        The server's note of the last id is believed if it is the last one that the producer knows to be stored, or one that it has just
        sent and finds stored. Otherwise the stream itself is asked. Raises redis.ResponseError for entries of a stranger that keep out
        the producer's next messages.
        """
        noted = self._noted(outbox, stream)
        known = {outbox.confirmed, *(id for id, _, _ in outbox.sending)}
        if noted in known and all(stored == wire for stored, wire in self._read_back(outbox, stream, noted)):
            return noted
        stands = self._ask(outbox, stream)
        if any(stored not in (None, wire) for stored, wire in self._read_back(outbox, stream, stands)):
            return None
        names = [keys.last(outbox.run, stream, outbox.name), keys.epoch(outbox.run, stream, outbox.name)]
        self._note(keys=names, args=[outbox.epoch, id_text(stands)])
        return stands

    def _noted(self, outbox: Outbox, stream: str) -> Id | None:
        other: bytes | None = b"of another type"
        note = unless_other_type(lambda: self._client.get(keys.last(outbox.run, stream, outbox.name)), other)
        return read_id(b"0-0" if note is None else note)

    def _read_back(self, outbox: Outbox, stream: str, last: Id) -> list[tuple[bytes | None, bytes]]:
        """Of each message that was handed to the server and may be there: the bytes stored under its id (or None), and its own bytes."""
        doubtful = [(id, wire) for id, wire in outbox.batch() if id <= last]
        if not doubtful:
            return []
        key = keys.entries(outbox.run, stream, outbox.name)
        stored = dict(self._client.xrange(key, id_text(doubtful[0][0]), id_text(doubtful[-1][0])))
        return [(stored.get(id_text(id).encode(), {}).get(b"m"), wire) for id, wire in doubtful]

    def _ask(self, outbox: Outbox, stream: str) -> Id:
        import redis

        key = keys.entries(outbox.run, stream, outbox.name)
        if not self._client.exists(key):
            return 0, 0
        start = id_text(outbox.confirmed if outbox.confirmed > (0, 0) else outbox.first)
        while entries := self._client.xrange(key, start, "+", PAGE):
            if any(not _own(outbox, id, fields) for id, fields in entries):
                raise redis.ResponseError(OCCUPIED.format(key=key))
            start = f"({entries[-1][0].decode()}"
        return parse_id(self._client.xinfo_stream(key)["last-generated-id"])


def _own(outbox: Outbox, id: bytes, fields: dict[bytes, bytes]) -> bool:
    try:
        envelope = decode(fields.get(b"m", b""))
    except Refused:
        return False
    return (envelope.run, envelope.producer, envelope.id.encode()) == (outbox.run, outbox.name, id)
