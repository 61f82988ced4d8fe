"""How many alerts about the bus itself are published: a server that flaps all night fills no log and no page.

Alerts of the training itself are never held back: they are part of the run's record, which repeats to the bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

A_MINUTE = 6  # of one kind
WINDOW_S = 60
CODE = "alerts_held_back"  # of the alert that says so
SHUT = "more than {most} alerts {code} came within {window} s: what comes in the next {window} s is counted and not published"
OPEN = "{count} alerts {code} were held back since tick {tick}; they are published again"
REST = "{count} alerts {code} were held back since tick {tick}"


@dataclass
class _Shut:
    """A code whose alerts are held back: since when, and how many were."""

    since: float  # monotonic seconds
    tick: int
    count: int = 0


class AlertLimit:
    """At most A_MINUTE of every code in any WINDOW_S seconds; then none for as long, with an alert at the beginning and a count at the end.

    ``held_back`` counts all that were not published.
    """

    def __init__(self, window_s: int = WINDOW_S) -> None:
        self.held_back = 0
        self._window_s = window_s
        self._shut: dict[str, _Shut] = {}
        self._limiter: Any = None

    def offer(self, code: str, sentence: str, tick: int) -> tuple[str, str] | None:
        """Code and sentence to publish for an alert: its own, those of the alert that such alerts are held back now, or None."""
        if code not in self._shut:
            if self._hit(code):
                return code, sentence
            self._shut[code] = _Shut(time.monotonic(), tick)
        shut = self._shut[code]
        shut.count += 1
        self.held_back += 1
        return (CODE, SHUT.format(most=A_MINUTE, code=code, window=self._window_s)) if shut.count == 1 else None

    def over(self, end: bool = False) -> list[str]:
        """Sentences about codes that are published again; at the ``end`` of the run about all codes that are held back."""
        now = time.monotonic()
        found = []
        for code, shut in list(self._shut.items()):
            opens = now - shut.since >= self._window_s
            if opens or end:
                del self._shut[code]
                found.append((OPEN if opens else REST).format(count=shut.count, code=code, tick=shut.tick))
        return found

    def _hit(self, code: str) -> bool:
        from limits import RateLimitItemPerSecond
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        if self._limiter is None:
            self._limiter = MovingWindowRateLimiter(MemoryStorage())
        hit: bool = self._limiter.hit(RateLimitItemPerSecond(A_MINUTE, self._window_s), code)
        return hit
