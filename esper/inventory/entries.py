"""A run or a sweep in a few words, wherever it was found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

RUN, JOB, SWEEP = "run", "job", "sweep"
KINDS = (RUN, JOB, SWEEP)

RUNNING, STOPPED, DAMAGED, UNKNOWN = "RUNNING", "STOPPED", "DAMAGED", "UNKNOWN"
STATUSES = ("FINISHED", "FAILED", "KILLED", "DIED", "NEW", RUNNING, STOPPED, DAMAGED, UNKNOWN)
"""DIED: its process ended without a word; NEW: it has not begun; STOPPED: a sweep that did not come to its end; DAMAGED: its files cannot
be read; UNKNOWN: another user's, whose lock cannot be tried."""


@dataclass
class Entry:
    """A run, a job of a sweep, or a sweep.

    ``id`` is the name of a run's folder or the id of a sweep, ``sweep`` the id of the sweep that a job belongs to. ``value`` is the
    deciding ``metric``, NaN where there is none; ``verdict`` is a sweep's. ``macs`` and ``seconds`` are the cost, for a sweep the sum over
    its jobs. ``done`` of ``jobs`` jobs of a sweep have ended (0: not known). ``changed`` is when it ended or was last heard of, in seconds
    since 1970. ``folder`` is None where the store alone has it; ``store_id`` is its run in MLflow.
    """

    kind: str
    id: str
    name: str
    status: str
    changed: float
    folder: Path | None = None
    arms: tuple[str, ...] = ()
    metric: str = ""
    value: float = math.nan
    verdict: str = ""
    macs: float = math.nan
    seconds: float = math.nan
    sweep: str = ""
    done: int = 0
    jobs: int = 0
    store_id: str = ""


def total(values: list[float]) -> float:
    """The sum of the finite values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) if finite else math.nan
