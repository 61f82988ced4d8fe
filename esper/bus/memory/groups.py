"""Bookkeeping of the in-process bus: one log a producer, one position and one pending list a consumer group.

``gc=False``: these refer to nothing that refers back, and Python's collector walking over thousands of them took half the time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

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
    """A message handed out and not yet acknowledged: to whom, how often, when last (monotonic seconds)."""

    owner: str
    deliveries: int
    since: float
    entry: Entry


@dataclass
class Group:
    """Where a consumer group stands in one log."""

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
    """What one producer published; ``base`` is the index of the first entry still held."""

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
