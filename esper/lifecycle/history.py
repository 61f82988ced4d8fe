"""A ring of each seed's latest transitions, over all the branches that it ever had."""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass
from typing import Any

from esper.lifecycle.stages import Stage

LENGTH = 16
"""Transitions that are kept of a seed; one life, from DORMANT to DORMANT, has at most eight."""
CAUSE = 200
"""Characters that are kept of a cause."""


@dataclass(frozen=True)
class Passed:
    """One transition; ``branch`` is −1 where none existed."""

    tick: int
    source: Stage
    target: Stage
    branch: int
    cause: str


class History:
    """Rings by row. A seed that never moved has none, so a million dormant seeds cost nothing."""

    def __init__(self) -> None:
        self.rings: dict[int, deque[Passed]] = {}

    def note(self, row: int, passed: Passed) -> None:
        """Remember a transition; the oldest of more than LENGTH is forgotten."""
        self.rings.setdefault(row, deque(maxlen=LENGTH)).append(passed)

    def of(self, row: int) -> list[Passed]:
        """The last transitions of a seed, oldest first."""
        return list(self.rings.get(row, ()))

    def copy(self, rows: list[int]) -> dict[int, list[Passed]]:
        """A copy for ``put_back``."""
        return {row: self.of(row) for row in rows}

    def put_back(self, copied: dict[int, list[Passed]]) -> None:
        """Restore these rings."""
        for row, ring in copied.items():
            self.rings.pop(row, None)
            if ring:
                self.rings[row] = deque(ring, maxlen=LENGTH)

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {
            str(row): [[int(value) if isinstance(value, Stage) else value for value in astuple(passed)] for passed in ring]
            for row, ring in self.rings.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError where it is none."""
        self.rings = {}
        for row, ring in state.items():
            for tick, source, target, branch, cause in ring:
                self.note(int(row), Passed(int(tick), Stage(source), Stage(target), int(branch), str(cause)))


def shortened(cause: str) -> str:
    """The cause, cut to CAUSE characters: it may name a command, whose id its sender chose."""
    return cause if len(cause) <= CAUSE else f"{cause[: CAUSE - 1]}…"
