"""Ids of stream entries: epoch and sequence, written ``<epoch>-<sequence>``."""

from __future__ import annotations

Id = tuple[int, int]


def parse(id: str | bytes) -> Id:
    """``"3-14"`` as ``(3, 14)``."""
    epoch, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(epoch), int(sequence)


def text(id: Id) -> str:
    """``(3, 14)`` as ``"3-14"``."""
    return f"{id[0]}-{id[1]}"
