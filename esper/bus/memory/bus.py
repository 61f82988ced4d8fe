"""The bus inside one process: the same pending, acknowledge, claim and dead-letter rules as a server, no bytes moved.

Messages are frozen structs and are handed over as they are. Beyond ``memory_mb`` the newest unread ones wait in a file,
until every group has acknowledged them; beyond ``spool_mb`` in it they are dropped, counted, and seen by consumers as gaps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

from esper.bus.config import MemoryConfig
from esper.bus.memory.log import Entry, Group, Log, Overflow, Pending
from esper.bus.protocol import STREAMS, Counts, DeadLetter, Delivery, Fenced, Id
from esper.messages import Message

_Key = tuple[str, str]  # stream, run


class MemoryBus:
    """Streams as lists behind one lock."""

    def __init__(self, config: MemoryConfig, folder: Path | None = None) -> None:
        self.config = config
        self.lock = threading.RLock()  # taken by itself, and not through the condition, for its speed
        self.news = threading.Condition(self.lock)
        self.waiting = 0  # readers that wait for news
        self.counters = Counts()
        self.incidents: deque[tuple[str, str]] = deque()
        self.overflow = Overflow(folder, config.spool_mb << 20)
        self.bytes_held = 0
        self._logs: dict[_Key, dict[str, Log]] = {}
        self._groups: dict[_Key, set[str]] = {}
        self._dead: dict[str, deque[DeadLetter]] = {}
        self._dead_count = 0

    @property
    def local(self) -> MemoryBus:
        """Itself."""
        return self

    def producer(self, stream: str, run: str, name: str = "main") -> MemoryProducer:
        """The producer ``name`` of a stream, which fences an earlier one of this name."""
        assert stream in STREAMS, stream
        with self.lock:
            logs = self._logs.setdefault((stream, run), {})
            log = logs.get(name)
            if log is None:
                log = logs[name] = Log(name)
                for group in self._groups.get((stream, run), ()):
                    log.join(group)
            log.epoch += 1
            return MemoryProducer(self, log)

    def consumer(self, stream: str, run: str, group: str, name: str) -> MemoryConsumer:
        """A member of a consumer group; a new group is made, and reads the messages that are still held, oldest first."""
        assert stream in STREAMS, stream
        with self.lock:
            logs = self._logs.setdefault((stream, run), {})
            self._groups.setdefault((stream, run), set()).add(group)
            for log in logs.values():
                log.join(group)
            return MemoryConsumer(self, stream, run, group, name, logs)

    def has_readers(self, stream: str, run: str) -> bool:
        """Whether any consumer group reads this stream."""
        return bool(self._groups.get((stream, run)))

    def dead_letters(self, run: str) -> list[DeadLetter]:
        """The dead letters, oldest first."""
        with self.lock:
            return list(self._dead.get(run, ()))

    def bury(self, stream: str, run: str, group: str, log: Log, pending: Pending) -> None:
        """Move one pending entry to the dead letters; the caller holds the lock."""
        entry = pending.entry
        message = self.message(entry)
        del log.groups[group].pending[entry.id]
        self.finished(log, entry)
        self._dead_count += 1
        reason = f"delivered {pending.deliveries} times without an acknowledgement"
        letter = DeadLetter(
            id=f"{self._dead_count}-0",
            stream=stream,
            producer=log.name,
            origin=entry.id,
            group=group,
            deliveries=pending.deliveries,
            reason=reason,
            message=message,
        )
        self._dead.setdefault(run, deque()).append(letter)
        self.counters.add("dead_letters")

    def replay(self, run: str, ids: list[str]) -> int:
        """Hand dead letters to their group once more, under their first ids and a fresh delivery count."""
        with self.lock:
            letters = [letter for letter in self._dead.get(run, ()) if letter.id in ids]
            for letter in letters:
                log = self._logs[(letter.stream, run)][letter.producer]
                log.groups[letter.group].replayed.append((letter.origin, letter.message))
            self._forget(run, ids)
            self.news.notify_all()
            return len(letters)

    def purge(self, run: str, ids: list[str]) -> int:
        """Forget dead letters."""
        with self.lock:
            return self._forget(run, ids)

    def _forget(self, run: str, ids: list[str]) -> int:
        kept = deque(letter for letter in self._dead.get(run, ()) if letter.id not in ids)
        removed = len(self._dead.get(run, ())) - len(kept)
        self._dead[run] = kept
        return removed

    def message(self, entry: Entry) -> Message:
        """The message of an entry, from memory or from the overflow file."""
        return entry.message if entry.message is not None else self.overflow.read(entry.place)

    def make_room(self) -> None:
        """Let go of entries that every group has read, on disk of those that none has pending; the caller holds the lock."""
        for logs in self._logs.values():
            for log in logs.values():
                for entry in log.trim():
                    if entry.message is not None:
                        self.bytes_held -= entry.size
                    else:
                        self.finished(log, entry)

    def finished(self, log: Log, entry: Entry) -> None:
        """Free an entry's place on disk, once it is neither unread nor pending in any group; the caller holds the lock."""
        if entry.message is None and not log.wanted(entry):
            self.overflow.release(entry)

    def counts(self) -> dict[str, int]:
        """Counters of this bus, with ``spool_bytes``."""
        with self.lock:
            sent = sum(log.stored for logs in self._logs.values() for log in logs.values())
        return self.counters.snapshot() | {"sent": sent, "spool_bytes": self.overflow.bytes_held}

    def close(self) -> None:
        """Remove the overflow file."""
        self.overflow.close()


class MemoryProducer:
    """A producer of one stream; ``publish`` appends to a list."""

    def __init__(self, bus: MemoryBus, log: Log) -> None:
        self._bus = bus
        self._log = log
        self.epoch = log.epoch
        self.sequence = 0
        self._limit = bus.config.memory_mb << 20

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        """Append; raises Fenced when a newer producer of the same name exists."""
        bus, log = self._bus, self._log
        size = 200 + len(getattr(message, "data", b""))
        with bus.lock:
            if log.epoch != self.epoch:
                raise Fenced(f"producer {log.name!r} was started again (epoch {log.epoch}); epoch {self.epoch} stops")
            self.sequence += 1
            entry = Entry(self.epoch, self.sequence, time.time(), after, message, size)
            if bus.bytes_held + size > self._limit:
                bus.make_room()
                if bus.bytes_held + size > self._limit and not bus.overflow.take(entry):
                    bus.counters.add("dropped")
                    return
            if entry.message is not None:
                bus.bytes_held += size
            log.entries.append(entry)
            log.stored += 1
            if bus.waiting:
                bus.news.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Always stored."""
        return True

    def close(self) -> None:
        """Nothing to release."""


class MemoryConsumer:
    """A member of a consumer group over all producers of one stream."""

    answered = True

    def __init__(self, bus: MemoryBus, stream: str, run: str, group: str, name: str, logs: dict[str, Log]) -> None:
        self._bus, self._stream, self._run = bus, stream, run
        self.group, self.name = group, name
        self._logs = logs
        self._mine = deque((log, id) for log in logs.values() for id, held in log.groups[group].pending.items() if held.owner == name)
        self._kept: dict[tuple[str, str], Pending] = {}  # by producer and id
        self._next_claim = 0.0
        self._handled = {log.name: log.groups[group].handled() for log in logs.values()}

    def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages, waiting at most ``block_s`` seconds for the first."""
        deadline = time.monotonic() + block_s
        bus = self._bus
        with bus.lock:
            while True:
                found = self._take(count)
                left = deadline - time.monotonic() if block_s > 0 else 0.0
                if found or left <= 0:
                    break
                bus.waiting += 1
                bus.news.wait(min(left, bus.config.claim_s))
                bus.waiting -= 1
        if found:
            bus.counters.add("received", len(found))
        return found

    def _take(self, count: int) -> list[Delivery]:
        found: list[Delivery] = []
        now = time.monotonic()
        while self._mine and len(found) < count:
            log, id = self._mine.popleft()
            self._take_over(log, id, found, now)
        if now >= self._next_claim:
            self._claim(found, count, now)
        for log in self._logs.values():
            group = log.groups[self.group]
            while group.replayed and len(found) < count:
                origin, message = group.replayed.popleft()
                epoch, _, sequence = origin.partition("-")
                entry = Entry(int(epoch), int(sequence), 0.0, (), message, 0)
                group.pending[origin] = Pending(self.name, 1, now, entry)
                found.append(Delivery(origin, message, 1, log.name))
            if group.next < log.end and len(found) < count:
                self._take_new(log, group, found, count, now)
        return found

    def _take_new(self, log: Log, group: Group, found: list[Delivery], count: int, now: float) -> None:
        last = min(log.end, group.next + count - len(found))
        owner, producer, pending = self.name, log.name, group.pending
        for entry in log.window(group.next, last):
            message = entry.message if entry.message is not None else self._bus.message(entry)
            if missing := group.gap(entry):
                self._bus.counters.add("gaps", missing)
            id = f"{entry.epoch}-{entry.sequence}"  # entry.id, without the call
            pending[id] = Pending(owner, 1, now, entry)
            found.append(Delivery(id, message, 1, producer, entry.time, entry.after))
        group.next = last

    def _claim(self, found: list[Delivery], count: int, now: float) -> None:
        """Take over messages that any member has held for too long, and renew those that this one keeps."""
        claim_s = self._bus.config.claim_s
        for held in self._kept.values():
            if held.owner == self.name:
                held.since = now
        for log in self._logs.values():
            pending = log.groups[self.group].pending
            for id in [id for id, held in pending.items() if now - held.since >= claim_s]:
                if len(found) >= count:
                    return
                self._take_over(log, id, found, now)
        self._next_claim = now + claim_s / 4

    def _take_over(self, log: Log, id: str, found: list[Delivery], now: float) -> None:
        held = log.groups[self.group].pending.get(id)
        if held is None:
            return
        if held.deliveries >= self._bus.config.deliveries:
            self._bus.bury(self._stream, self._run, self.group, log, held)
            return
        held.owner, held.deliveries, held.since = self.name, held.deliveries + 1, now
        entry = held.entry
        found.append(Delivery(id, self._bus.message(entry), held.deliveries, log.name, entry.time, entry.after))

    def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge after handling; acknowledging twice is harmless."""
        bus = self._bus
        with bus.lock:
            for delivery in deliveries:
                log = self._logs[delivery.producer]
                held = log.groups[self.group].pending.pop(delivery.id, None)
                self._kept.pop((delivery.producer, delivery.id), None)
                if held is not None and held.entry.message is None:
                    bus.finished(log, held.entry)
            if bus.overflow.bytes_held:
                bus.make_room()
        if deliveries:
            bus.counters.add("acknowledged", len(deliveries))

    def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes long: while this consumer reads, no other consumer is given them."""
        with self._bus.lock:
            for delivery in deliveries:
                held = self._logs[delivery.producer].groups[self.group].pending.get(delivery.id)
                if not on:
                    self._kept.pop((delivery.producer, delivery.id), None)
                elif held is not None:
                    self._kept[delivery.producer, delivery.id] = held

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the group had acknowledged all when this member joined."""
        return self._handled

    def close(self) -> None:
        """Messages that were not acknowledged stay pending."""
