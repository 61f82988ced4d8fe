"""How many examples property tests draw: all of them in the whole suite, a fifth of them in ``scripts/test quick``."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("whole", max_examples=100, deadline=None)
settings.register_profile("quick", max_examples=20, deadline=None)


def examples(whole: int) -> int:
    """How many of ``whole`` examples this run draws, two at least."""
    return max(2, whole * settings.default.max_examples // 100)
