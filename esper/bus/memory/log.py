"""Bookkeeping of the bus in memory: a log for every producer, a position and pending entries for every consumer group, and a file for
messages that do not fit in memory.

``gc=False``: these refer to nothing that refers back, and Python's collector walking over thousands of them took half the time.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from esper.bus.codec import decode_body, encode_body
from esper.bus.protocol import Id
from esper.messages import Message

Extent = tuple[int, int]  # offset and bytes of a piece of the overflow file


class Entry(msgspec.Struct, gc=False):
    """One published message; ``message`` is None while its bytes wait in the overflow file at ``place``, piece by piece."""

    epoch: int
    sequence: int
    time: float
    after: tuple[str, ...]
    message: Message | None
    size: int
    place: tuple[Extent, ...] = ()

    @property
    def id(self) -> str:
        """``<epoch>-<sequence>``."""
        return f"{self.epoch}-{self.sequence}"


class Pending(msgspec.Struct, gc=False):
    """A message delivered and not yet acknowledged: the consumer, the number of deliveries, the time of the last (monotonic seconds)."""

    owner: str
    deliveries: int
    since: float
    entry: Entry


@dataclass
class Group:
    """The position of a consumer group in one log."""

    next: int = 0
    pending: dict[str, Pending] = field(default_factory=dict)
    replayed: deque[tuple[str, Any]] = field(default_factory=deque)
    epoch: int = 0
    sequence: int = 0

    def handled(self) -> Id:
        """The last number before the oldest that waits for its acknowledgement, or else the last that was handed out."""
        waiting = [(held.entry.epoch, held.entry.sequence - 1) for held in self.pending.values()]
        return min(waiting, default=(self.epoch, self.sequence))

    def gap(self, entry: Entry) -> int:
        """How many sequence numbers are missing before ``entry``; moves on to it."""
        missing = entry.sequence - 1 - (self.sequence if entry.epoch == self.epoch else 0)
        self.epoch, self.sequence = entry.epoch, entry.sequence
        return missing


@dataclass
class Log:
    """The messages of one producer; ``base`` is the index of the first entry still held."""

    name: str
    epoch: int = 0
    base: int = 0
    trimmed: tuple[int, int] = (0, 0)  # epoch and sequence of the last entry let go of
    stored: int = 0
    entries: deque[Entry] = field(default_factory=deque)
    groups: dict[str, Group] = field(default_factory=dict)

    def join(self, group: str) -> None:
        """Let a group in, reading from the oldest entry still held; harmless for one that is in."""
        if group not in self.groups:
            self.groups[group] = Group(next=self.base, epoch=self.trimmed[0], sequence=self.trimmed[1])

    @property
    def end(self) -> int:
        """Index after the last entry."""
        return self.base + len(self.entries)

    def window(self, first: int, last: int) -> list[Entry]:
        """Entries with indices in ``[first, last)``."""
        if first == self.base and last == self.end:
            return list(self.entries)
        if last == self.end:  # a deque is slow to index in its middle, quick from either end
            tail = list(islice(reversed(self.entries), last - first))
            tail.reverse()
            return tail
        return list(islice(self.entries, first - self.base, last - self.base))

    def trim(self) -> list[Entry]:
        """Let go of the entries that every group has read, and which they are; pending ones are kept by their group."""
        if not self.groups:
            return []
        floor = min(group.next for group in self.groups.values())
        gone = []
        while self.base < floor:
            entry = self.entries.popleft()
            gone.append(entry)
            self.base += 1
            self.trimmed = (entry.epoch, entry.sequence)
        return gone

    def wanted(self, entry: Entry) -> bool:
        """Whether the entry is still held here, or pending in a group."""
        if (entry.epoch, entry.sequence) > self.trimmed:
            return True
        held = (group.pending.get(entry.id) for group in self.groups.values())
        return any(pending is not None and pending.entry is entry for pending in held)


class Overflow:
    """An anonymous temporary file in ``folder``, made when first needed, of at most ``limit`` bytes.

    Released messages make room: a new one is written into the holes that they left, in pieces where none is large enough,
    and the file only grows when there are none. So it is full when it holds ``limit`` bytes of messages, and not before.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._file: IO[bytes] | None = None
        self._end = 0
        self._holes: dict[int, int] = {}  # offset -> bytes; no two of them touch
        self._hole_before: dict[int, int] = {}  # offset after a hole -> offset of the hole
        self.bytes_held = 0

    def take(self, entry: Entry) -> bool:
        """Move the message of ``entry`` into the file; False when that is full, or the disk is."""
        assert entry.message is not None
        data = encode_body(entry.message)
        if self.bytes_held + len(data) > self._limit:
            return False
        place = self._room(len(data))
        self.bytes_held += len(data)
        try:
            self._write(place, memoryview(data))
        except OSError:  # the disk is full: this message is lost and counted, those before it are not
            self._free(place)
            return False
        entry.place, entry.message = place, None
        return True

    def read(self, place: tuple[Extent, ...]) -> Message:
        """The message whose bytes lie at ``place``."""
        assert self._file is not None
        return decode_body(b"".join(os.pread(self._file.fileno(), size, offset) for offset, size in place))

    def release(self, entry: Entry) -> None:
        """Let go of an entry's bytes, if it has any here; releasing twice is harmless."""
        self._free(entry.place)
        entry.place = ()

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._forget()

    def _room(self, size: int) -> tuple[Extent, ...]:
        """Extents of together ``size`` bytes: holes first, then the file's end."""
        place = []
        while size and self._holes:
            offset, free = self._holes.popitem()
            del self._hole_before[offset + free]
            used = min(size, free)
            if used < free:
                self._holes[offset + used] = free - used
                self._hole_before[offset + free] = offset + used
            place.append((offset, used))
            size -= used
        if size:
            place.append((self._end, size))
            self._end += size
        return tuple(place)

    def _write(self, place: tuple[Extent, ...], data: memoryview) -> None:
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - open for the bus's life
        for offset, size in place:
            part, data = data[:size], data[size:]
            while part:  # a write may take a part
                written = os.pwrite(self._file.fileno(), part, offset)
                part, offset = part[written:], offset + written

    def _free(self, place: tuple[Extent, ...]) -> None:
        for offset, size in place:
            self.bytes_held -= size
            if (before := self._hole_before.pop(offset, None)) is not None:
                size += self._holes.pop(before)
                offset = before
            if (after := self._holes.pop(offset + size, None)) is not None:
                size += after
            self._holes[offset] = size
            self._hole_before[offset + size] = offset
        if place and not self.bytes_held:
            self._forget()
            if self._file is not None:
                os.ftruncate(self._file.fileno(), 0)

    def _forget(self) -> None:
        self._end = self.bytes_held = 0
        self._holes.clear()
        self._hole_before.clear()
