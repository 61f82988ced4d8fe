"""A file for messages that do not fit in memory, written where there is room and read anywhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from esper.bus.codec import decode_body, encode_body
from esper.bus.memory.groups import Entry, Extent
from esper.messages import Message


class Overflow:
    """An anonymous temporary file in ``folder``, made when first needed, of at most ``limit`` bytes.

    What is let go makes room: a message is written into the holes that others left, in pieces where none is large enough,
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
