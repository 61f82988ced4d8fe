"""What a bus counts: nothing is lost, refused or repeated without a number that says so."""

from __future__ import annotations

import threading

NAMES = (
    "sent",  # messages stored by the backend
    "received",  # messages handed to consumers, redeliveries included
    "acknowledged",
    "dropped",  # messages given up because memory and spool were full
    "gaps",  # sequence numbers a consumer found missing
    "duplicates",  # messages seen before and not handed out again
    "refused",  # corrupt, malformed, oversized, newer, or of another run
    "dead_letters",
    "retries",  # attempts to reach the server that failed
    "late",  # messages released out of order because the bounded hold ran out
)


class Counts:
    """Counters shared by the threads of one bus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(NAMES, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one of NAMES."""
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counters at this moment."""
        with self._lock:
            return dict(self._values)


def in_words(counts: dict[str, int]) -> str:
    """``3 sent, 12 received, …``, by NAMES."""
    return ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in NAMES)
