"""How many alerts about the bus itself are published: a server that flaps all night fills no log and no page.

Alerts of the training itself are never held back: they are part of the run's record, which repeats to the bit.
"""

from __future__ import annotations

A_MINUTE = 6  # of one kind


class AlertLimit:
    """At most A_MINUTE of every code in any minute; ``held_back`` counts the rest."""

    def __init__(self) -> None:
        self.held_back = 0
        self._limiter = None

    def allows(self, code: str) -> bool:
        """Whether one more alert of this code may be published now."""
        from limits import RateLimitItemPerMinute
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        if self._limiter is None:
            self._limiter = MovingWindowRateLimiter(MemoryStorage())
        allowed = self._limiter.hit(RateLimitItemPerMinute(A_MINUTE), code)
        self.held_back += not allowed
        return allowed
