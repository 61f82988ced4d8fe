"""A file for messages that do not fit in memory, written at its end and read anywhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from esper.bus.codec import decode_body, encode_body
from esper.bus.groups import Entry
from esper.bus.messages import Message


class Overflow:
    """An anonymous temporary file in ``folder``, made when first needed, of at most ``limit`` bytes."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._file: IO[bytes] | None = None
        self.bytes_held = 0

    def take(self, entry: Entry) -> bool:
        """Move the message of ``entry`` into the file; False when it would grow beyond its limit."""
        data = encode_body(entry.message)
        if self.bytes_held + len(data) > self._limit:
            return False
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - open for the bus's life
        self._file.seek(self.bytes_held)
        self._file.write(data)
        entry.place = (self.bytes_held, len(data))
        entry.message = None
        self.bytes_held += len(data)
        return True

    def read(self, place: tuple[int, int]) -> Message:
        """The message at ``place`` (offset, bytes)."""
        assert self._file is not None
        return decode_body(os.pread(self._file.fileno(), place[1], place[0]))

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self.bytes_held = 0
