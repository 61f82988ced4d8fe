"""The eleven stages of a seed, integer-coded in the order of the life they describe."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """A seed's stage; see ``docs/lifecycle.md`` for its effect on the forward pass and the parameters."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10
