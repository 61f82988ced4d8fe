"""What was measured now against what was committed, each with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SLACK = 1.1
"""A benchmark on another day differs by so much without any reason in the code."""


@dataclass(frozen=True)
class Spread:
    """The twentieth and the eightieth percentile of a ratio of which smaller is better."""

    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of two or more repetitions; of a single one that alone."""
        if len(values) < 2:
            return cls(values[0], values[0])
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return cls(cuts[0], cuts[3])


def regressions(now: dict[str, Spread], then: dict[str, Spread]) -> list[str]:
    """A sentence for every row that is worse for certain: its better fifth lies above the baseline's worse fifth, by more than ``SLACK``.

    Rows that only one side has are no regression.
    """
    return [
        f"{name}: {found.p20:.3f} to {found.p80:.3f}, and the baseline has {then[name].p20:.3f} to {then[name].p80:.3f}"
        for name, found in now.items()
        if name in then and found.p20 > then[name].p80 * SLACK
    ]
