"""Numbers as people read them."""

from __future__ import annotations

import math

UNITS = ("", "K", "M", "G", "T", "P", "E")


def short(value: float | None, digits: int = 4) -> str:
    """Four significant digits; ``–`` for what is unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """``1234567`` → ``1.23 M``; exact below ten thousand."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 10_000:
        return f"{value:.0f}"
    power = 0
    while abs(value) >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {UNITS[power]}"


def duration(seconds: float | None) -> str:
    """``75`` → ``1:15``; ``–`` for what is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
