"""The columns of telemetry: what is measured of every seed at a tick. A new measure begins with its column here."""

from __future__ import annotations

from enum import IntEnum


class Column(IntEnum):
    """The columns of a telemetry row, one row a seed and tick; NaN is a value that was not measured."""

    STAGE = 0
    ALPHA = 1
    MEAN = 2
    VARIANCE = 3
    NEAR_ZERO = 4
    CORRELATION = 5
    GRAD_NORM = 6
    BRANCH_RMS_RATIO = 7
    GRAD_RATIO = 8
    AGE = 9
    GENERATION = 10
    GAIN = 11


COLUMNS = tuple(column.name.lower() for column in Column)
"""The columns' names, as messages, files and predicates spell them."""
