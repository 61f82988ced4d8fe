"""Lengths of time in a config: ``50step``, ``2epoch`` or ``5%`` of the run, turned into ticks once the run's length is known."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from esper.errors import UserError

LONGEST = 2**53
"""Ticks that no run reaches; sums of a few such durations still fit the tables' integers."""

_FORM = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*$")


@dataclass(frozen=True)
class Duration:
    """An amount and its unit (``step``, ``epoch`` or ``%`` of the run)."""

    amount: float
    unit: str

    def ticks(self, total_ticks: int, ticks_per_epoch: int, steps_per_tick: int = 1) -> int:
        """Whole ticks in a run of ``total_ticks``; a positive length is at least one tick, and at most ``LONGEST``."""
        scale = {"step": 1.0 / steps_per_tick, "epoch": float(ticks_per_epoch), "%": total_ticks / 100.0}[self.unit]
        exact = self.amount * scale
        return 0 if exact == 0 else max(1, math.floor(min(exact, LONGEST) + 0.5))


def parse(text: str) -> Duration:
    """Read ``"50step"``, ``"2epoch"`` or ``"5%"``; raises UserError for anything else."""
    match = _FORM.match(str(text))
    if match is None:
        raise UserError(f"'{text}' is no duration; write for example 50step, 2epoch or 5% (of the run).")
    unit = match.group(2)
    return Duration(float(match.group(1)), unit if unit == "%" else unit.rstrip("s"))


def is_duration(text: str) -> bool:
    """Whether ``parse`` can read it."""
    return _FORM.match(text) is not None
