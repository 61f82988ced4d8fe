"""Messages that wait on disk: segments appended at the end, read and deleted from the front, kept over a restart.

A record is ``<length u32><epoch u64><sequence u64>`` and the wire bytes, which carry their own checksum.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from esper.errors import UserError

IN_FLIGHT = "in_flight"
LOCK = "lock"
RECORD = struct.Struct("<IQQ")
SEGMENTS = 16  # a full spool has about this many; dropping the oldest gives up one of them


@dataclass
class Segment:
    """One file: its path, records and bytes."""

    path: Path
    records: int
    size: int


def records_in(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """``(epoch, sequence, wire)`` of every whole record of a file; one that was cut off ends it."""
    with path.open("rb") as file:
        while len(header := file.read(RECORD.size)) == RECORD.size:
            length, epoch, sequence = RECORD.unpack(header)
            if len(wire := file.read(length)) < length:
                return
            yield epoch, sequence, wire


def left_in(folder: Path) -> Iterator[tuple[int, int, bytes]]:
    """What waits in a spool's folder for the next process, oldest first; nothing is changed there."""
    for path in (folder / IN_FLIGHT, *sorted(folder.glob("*.spool"))):
        if path.exists():
            yield from records_in(path)


def claim(folder: Path, alone: bool) -> IO[bytes]:
    """A lock on a spool's folder, held until the file that is returned is closed, or its process dies.

    Every start of a producer shares it, since a newer start is told apart by its epoch; ``alone`` shares it with nobody.
    Raises UserError where that cannot be had.
    """
    file = (folder / LOCK).open("wb")
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"the messages in {folder} belong to a process that is at work, and it sends them itself when the server answers"
            if alone
            else f"`esper bus flush` is sending the messages in {folder}: start again when it is done"
        ) from None
    return file


class Spool:
    """A first-in-first-out queue of wire messages in ``folder``, at most ``limit`` bytes.

    ``drop`` says what goes when it is full: the ``newest`` message (the one that comes) or the ``oldest`` segment.
    Not thread-safe: its owner holds a lock.
    """

    def __init__(self, folder: Path, limit: int, drop: str = "newest") -> None:
        self._folder = folder
        self._in_flight = folder / IN_FLIGHT
        self._limit = limit
        self._drop = drop
        self._segment_bytes = max(4096, limit // SEGMENTS)
        self._segments: deque[Segment] = deque()
        self._writer: IO[bytes] | None = None
        self._reader: IO[bytes] | None = None
        self._read_in_head = 0  # records of the head segment already read
        self._done_in_head = 0  # … and released
        self._number = 0
        self.bytes_held = 0
        self.unread = 0
        if folder.is_dir():
            self._recover()

    def append(self, epoch: int, sequence: int, wire: bytes) -> int:
        """Add one message; the number of messages dropped because of it (itself or older ones)."""
        size = RECORD.size + len(wire)
        dropped = 0
        while self.bytes_held + size > self._limit:
            given_up = self._drop_oldest() if self._drop == "oldest" else 0
            if given_up == 0:
                return dropped + 1
            dropped += given_up
        if self._writer is None or self._segments[-1].size >= self._segment_bytes:
            self._open_segment()
        tail = self._segments[-1]
        try:
            self._write(RECORD.pack(len(wire), epoch, sequence) + wire)
        except OSError:  # the disk is full: this message is lost and counted, those before it are not
            os.ftruncate(self._writer.fileno(), tail.size)
            self._writer.seek(tail.size)
            return dropped + 1
        tail.records += 1
        tail.size += size
        self.bytes_held += size
        self.unread += 1
        return dropped

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # an unbuffered file may take a part
            left = left[self._writer.write(left) :]

    def read(self, count: int, max_bytes: int) -> list[tuple[int, int, bytes]]:
        """The next messages in order, as ``(epoch, sequence, wire)``; they stay on disk until ``release``."""
        found: list[tuple[int, int, bytes]] = []
        total = 0
        while self.unread and len(found) < count and total < max_bytes:
            if self._read_in_head == self._segments[0].records:
                break  # the rest is in the next segment, which opens when this one is released
            if self._reader is None:
                self._reader = self._segments[0].path.open("rb")
            length, epoch, sequence = RECORD.unpack(self._reader.read(RECORD.size))
            found.append((epoch, sequence, self._reader.read(length)))
            self._read_in_head += 1
            self.unread -= 1
            total += length
        return found

    def release(self, count: int) -> None:
        """Forget the oldest ``count`` messages that were read; finished segments are deleted."""
        self._done_in_head += count
        head = self._segments[0]
        assert self._done_in_head <= self._read_in_head
        if self._done_in_head == head.records:
            self._remove_head()

    def sync(self) -> None:
        """Have the operating system put everything on the disk."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())

    def close(self) -> None:
        """Close the files; what waits is found again by the next Spool of this folder."""
        for file in (self._writer, self._reader):
            if file is not None:
                file.close()
        self._writer = self._reader = None

    def _open_segment(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._writer is not None:
            self._writer.close()
        self._number += 1
        path = self._folder / f"{self._number:08d}.spool"
        self._writer = path.open("wb", buffering=0)
        self._segments.append(Segment(path, 0, 0))

    def _remove_head(self) -> None:
        head = self._segments.popleft()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if not self._segments and self._writer is not None:
            self._writer.close()
            self._writer = None
        self._read_in_head = self._done_in_head = 0
        self.bytes_held -= head.size
        head.path.unlink()

    def _drop_oldest(self) -> int:
        """Give up the oldest segment nothing of which is being sent; how many messages were in it."""
        busy = self._read_in_head > self._done_in_head
        position = 1 if busy else 0
        if len(self._segments) <= position:
            return 0
        if not busy:
            lost = self._segments[0].records - self._done_in_head
            self._remove_head()
        else:
            segment = self._segments[1]
            if segment is self._segments[-1]:
                return 0
            del self._segments[1]
            segment.path.unlink()
            self.bytes_held -= segment.size
            lost = segment.records
        self.unread -= lost
        return lost

    def keep_in_flight(self, records: list[tuple[int, int, bytes]]) -> None:
        """Keep ``(epoch, sequence, wire)`` older than anything in here, for the next Spool of this folder alone."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "in_flight.partial"
        with partial.open("wb") as file:
            for epoch, sequence, wire in records:
                file.write(RECORD.pack(len(wire), epoch, sequence) + wire)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._in_flight)

    def forget_in_flight(self) -> None:
        """They have arrived."""
        self._in_flight.unlink(missing_ok=True)

    def _recover(self) -> None:
        """Find what an earlier process left; a record cut off by its death is cut off for good."""
        if self._in_flight.exists():
            first = self._folder / f"{0:08d}.spool"  # segments count from 1: this one comes before them all
            older = first.read_bytes() if first.exists() else b""
            self._in_flight.write_bytes(self._in_flight.read_bytes() + older)
            self._in_flight.replace(first)
        for path in sorted(self._folder.glob("*.spool")):
            self._number = int(path.stem)
            records = size = 0
            for _, _, wire in records_in(path):
                records += 1
                size += RECORD.size + len(wire)
            if records == 0:
                path.unlink()
                continue
            os.truncate(path, size)
            self._segments.append(Segment(path, records, size))
            self.bytes_held += size
            self.unread += records
