"""Ids of stream entries: epoch and sequence, written ``<epoch>-<sequence>``."""

from __future__ import annotations

import re

Id = tuple[int, int]
LARGEST = (1 << 64) - 1
_ID = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")


def parse(id: str | bytes) -> Id:
    """``"3-14"`` as ``(3, 14)``."""
    epoch, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(epoch), int(sequence)


def read(value: object) -> Id | None:
    """An id that came from a server, where anybody may have written; None for what is none (epoch and sequence are 64 bits each)."""
    found = _ID.fullmatch(value) if isinstance(value, bytes) else None
    id = (int(found[1]), int(found[2])) if found else (LARGEST + 1, 0)
    return id if max(id) <= LARGEST else None


def text(id: Id) -> str:
    """``(3, 14)`` as ``"3-14"``."""
    return f"{id[0]}-{id[1]}"
