"""Messages that wait on disk: segments appended at the end, read and deleted from the front, kept over a restart.

A frame is ``<length u32><epoch u64><sequence u64>`` and the wire bytes, which carry their own checksum.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

from esper.errors import UserError

IN_FLIGHT = "in_flight"
LOCK = "lock"
FRAME = struct.Struct("<IQQ")
SEGMENTS = 16  # a full spool has about this many; dropping the oldest gives up one of them


@dataclass
class Segment:
    """One file: its path, frames and bytes."""

    path: Path
    frames: int
    size: int


def frames_in(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """``(epoch, sequence, wire)`` of every whole frame of a file; one that was cut off ends it."""
    with path.open("rb") as file:
        while len(header := file.read(FRAME.size)) == FRAME.size:
            length, epoch, sequence = FRAME.unpack(header)
            if len(wire := file.read(length)) < length:
                return
            yield epoch, sequence, wire


def left_in(folder: Path) -> Iterator[tuple[int, int, bytes]]:
    """The messages in a spool's folder that wait for the next process, oldest first; nothing is changed there."""
    for path in (folder / IN_FLIGHT, *sorted(folder.glob("*.spool"))):
        if path.exists():
            yield from frames_in(path)


def lock_folder(folder: Path, alone: bool) -> IO[bytes]:
    """A lock on a spool's folder, held until the file that is returned is closed, or its process dies.

    Every start of a producer shares it, since a newer start is told apart by its epoch; ``alone`` shares it with none.
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

    ``drop`` says which messages go when it is full: the ``newest`` message (the one that comes) or the ``oldest`` segment.
    Not thread-safe: its owner holds a lock.
    """

    def __init__(self, folder: Path, limit: int, drop: str = "newest") -> None:
        self._folder = folder
        self._in_flight = folder / IN_FLIGHT
        self._limit = limit
        self._drop = drop
        self._segment_bytes = max(4096, limit // SEGMENTS)
        self._segments: deque[Segment] = deque()
        self._tail: FileIO | None = None  # the last segment, open for appending
        self._head: IO[bytes] | None = None  # the first one, open for reading
        self._read_of_first = 0  # frames of the head segment already read
        self._done_of_first = 0  # … and released
        self._number = 0
        self.bytes_held = 0
        self.unread = 0
        if folder.is_dir():
            self._recover()

    def append(self, epoch: int, sequence: int, wire: bytes) -> int:
        """Add one message; the number of messages dropped because of it (itself or older ones)."""
        size = FRAME.size + len(wire)
        dropped = 0
        while self.bytes_held + size > self._limit:
            given_up = self._drop_oldest() if self._drop == "oldest" else 0
            if given_up == 0:
                return dropped + 1
            dropped += given_up
        if self._tail is None or self._segments[-1].size >= self._segment_bytes:
            self._tail = self._open_segment()
        tail = self._segments[-1]
        try:
            _write(self._tail, FRAME.pack(len(wire), epoch, sequence) + wire)
        except OSError:  # the disk is full: this message is lost and counted, those before it are not
            os.ftruncate(self._tail.fileno(), tail.size)
            self._tail.seek(tail.size)
            return dropped + 1
        tail.frames += 1
        tail.size += size
        self.bytes_held += size
        self.unread += 1
        return dropped

    def read(self, count: int, max_bytes: int) -> list[tuple[int, int, bytes]]:
        """The next messages in order, as ``(epoch, sequence, wire)``; they stay on disk until ``release``."""
        found: list[tuple[int, int, bytes]] = []
        total = 0
        while self.unread and len(found) < count and total < max_bytes:
            if self._read_of_first == self._segments[0].frames:
                break  # the rest is in the next segment, which opens when this one is released
            if self._head is None:
                self._head = self._segments[0].path.open("rb")
            length, epoch, sequence = FRAME.unpack(self._head.read(FRAME.size))
            found.append((epoch, sequence, self._head.read(length)))
            self._read_of_first += 1
            self.unread -= 1
            total += length
        return found

    def release(self, count: int) -> None:
        """Forget the oldest ``count`` messages that were read; finished segments are deleted."""
        self._done_of_first += count
        head = self._segments[0]
        assert self._done_of_first <= self._read_of_first
        if self._done_of_first == head.frames:
            self._remove_head()

    def sync(self) -> None:
        """Have the operating system put everything on the disk."""
        if self._tail is not None:
            os.fsync(self._tail.fileno())

    def close(self) -> None:
        """Close the files; the next Spool of this folder finds the messages again."""
        for file in (self._tail, self._head):
            if file is not None:
                file.close()
        self._tail = self._head = None

    def _open_segment(self) -> FileIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._tail is not None:
            self._tail.close()
        self._number += 1
        path = self._folder / f"{self._number:08d}.spool"
        self._segments.append(Segment(path, 0, 0))
        return path.open("wb", buffering=0)

    def _remove_head(self) -> None:
        head = self._segments.popleft()
        if self._head is not None:
            self._head.close()
            self._head = None
        if not self._segments and self._tail is not None:
            self._tail.close()
            self._tail = None
        self._read_of_first = self._done_of_first = 0
        self.bytes_held -= head.size
        head.path.unlink()

    def _drop_oldest(self) -> int:
        """Give up the oldest segment nothing of which is being sent; how many messages were in it."""
        busy = self._read_of_first > self._done_of_first
        position = 1 if busy else 0
        if len(self._segments) <= position:
            return 0
        if not busy:
            lost = self._segments[0].frames - self._done_of_first
            self._remove_head()
        else:
            segment = self._segments[1]
            if segment is self._segments[-1]:
                return 0
            del self._segments[1]
            segment.path.unlink()
            self.bytes_held -= segment.size
            lost = segment.frames
        self.unread -= lost
        return lost

    def keep_in_flight(self, frames: list[tuple[int, int, bytes]]) -> None:
        """Keep ``(epoch, sequence, wire)`` older than anything in here, for the next Spool of this folder alone."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "in_flight.partial"
        with partial.open("wb") as file:
            for epoch, sequence, wire in frames:
                file.write(FRAME.pack(len(wire), epoch, sequence) + wire)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._in_flight)

    def forget_in_flight(self) -> None:
        """They have arrived."""
        self._in_flight.unlink(missing_ok=True)

    def _recover(self) -> None:
        """Find the messages of an earlier process; a frame that its death cut off is removed."""
        if self._in_flight.exists():
            first = self._folder / f"{0:08d}.spool"  # segments count from 1: this one comes before them all
            older = first.read_bytes() if first.exists() else b""
            self._in_flight.write_bytes(self._in_flight.read_bytes() + older)
            self._in_flight.replace(first)
        for path in sorted(self._folder.glob("*.spool")):
            self._number = int(path.stem)
            frames = size = 0
            for _, _, wire in frames_in(path):
                frames += 1
                size += FRAME.size + len(wire)
            if frames == 0:
                path.unlink()
                continue
            os.truncate(path, size)
            self._segments.append(Segment(path, frames, size))
            self.bytes_held += size
            self.unread += frames


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # an unbuffered file may take a part
        left = left[file.write(left) :]
