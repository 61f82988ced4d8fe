"""Bytes on disk with a SHA-256 for every piece of them, so that they can be checked on all cores at once.

SHA-256 is slower than reading from the disk's cache, and one hash over a file is the work of one core.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 16 << 20
SMALL = 1 << 20
Content = Sequence[memoryview | bytes]


@dataclass(frozen=True)
class Written:
    """Size of a file and the SHA-256 of each of its pieces of ``piece`` bytes (the last is what is left)."""

    bytes: int
    piece: int
    sha256: tuple[str, ...]

    def card(self) -> dict[str, Any]:
        """JSON-able."""
        return {"bytes": self.bytes, "piece": self.piece, "sha256": list(self.sha256)}

    @classmethod
    def of_card(cls, card: dict[str, Any]) -> Written:
        """The other way round. Raises KeyError, TypeError or ValueError for anything else."""
        made = cls(card["bytes"], card["piece"], tuple(card["sha256"]))
        if type(made.bytes) is not int or type(made.piece) is not int or made.bytes < 0 or made.piece < 1:
            raise ValueError("its sizes are no numbers")
        if len(made.sha256) != -(-made.bytes // made.piece):
            raise ValueError("it has not one hash for each piece")
        return made


def write_bytes(path: Path, content: Content) -> Written:
    """Write ``content``, one after the other, and wait until the disk has it; a thread hashes beside the writing."""
    # Small stretches are gathered: every call of the system is a chance for two threads to wait for each other.
    with path.open("wb", buffering=SMALL) as file, ThreadPoolExecutor(1, "esper-hash") as thread:
        digests = []
        for piece in _cut(content, PIECE):
            small = sum(map(len, piece)) < SMALL  # a thread of its own costs more
            digests.append(_digest(piece) if small else thread.submit(_digest, piece))
            for part in piece:
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
        size = sum(map(len, content))
        return Written(size, PIECE, tuple(digest if isinstance(digest, str) else digest.result() for digest in digests))


def read_bytes(path: Path, stated: Written) -> bytes:
    """A file that is no more than what was written. Raises ValueError for any other."""
    with path.open("rb") as file:
        _refuse_size(path, os.fstat(file.fileno()).st_size, stated)
        content = file.read()
    _refuse_other(path, memoryview(content), stated)
    return content


def map_bytes(path: Path, stated: Written) -> memoryview:
    """The same for a large file: its bytes where the system keeps them, checked on all cores and copied nowhere.

    Writing to them changes the memory and not the file. Whoever keeps some for longer than a moment copies them: what is
    written over the file afterwards may show, and a file cut short ends the process.
    """
    with path.open("rb") as file:
        _refuse_size(path, os.fstat(file.fileno()).st_size, stated)
        content = memoryview(mmap.mmap(file.fileno(), stated.bytes, access=mmap.ACCESS_COPY) if stated.bytes else b"")
    _refuse_other(path, content, stated)
    return content


def _refuse_size(path: Path, size: int, stated: Written) -> None:
    if size != stated.bytes:
        raise ValueError(f"its {path.name} is {'truncated' if size < stated.bytes else 'longer than what was written'}")


def _refuse_other(path: Path, content: memoryview, stated: Written) -> None:
    pieces = list(_cut([content], stated.piece))
    if len(content) < SMALL:
        found = [_digest(piece) for piece in pieces]
    else:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "esper-hash") as threads:
            found = list(threads.map(_digest, pieces))
    if tuple(found) != stated.sha256:
        raise ValueError(f"its {path.name} is not what was written")


def _cut(content: Content, size: int) -> Iterator[list[memoryview]]:
    """``content`` in pieces of ``size`` bytes, each a list of stretches; nothing is copied."""
    piece: list[memoryview] = []
    room = size
    for part in content:
        left = memoryview(part)
        while left:
            piece.append(left[:room])
            left, room = left[room:], room - len(left[:room])
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _digest(piece: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in piece:
        digest.update(part)
    return digest.hexdigest()
