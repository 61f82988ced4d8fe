"""Telemetry rows of a site as a few numbers a tick: seeds by stage, and means over them."""

from __future__ import annotations

import math

import numpy as np

from esper.lifecycle.stages import Stage
from esper.messages import Telemetry
from esper.tracking.tracker import rows

Point = tuple[int, str, float]  # tick, name, value

BLENDED = tuple(range(Stage.GRAFTING, Stage.FOSSILIZED + 1))
LEARNT = (int(Stage.TRAINING), *BLENDED)

MEANS: dict[str, tuple[int, ...]] = {
    "alpha": BLENDED,
    "gain": BLENDED,
    "branch_rms_ratio": BLENDED,
    "grad_ratio": LEARNT,
    "variance": (int(Stage.DORMANT), *LEARNT),
    "near_zero": (int(Stage.DORMANT), *LEARNT),
}
"""Columns whose mean is published, and the stages in which they say something; seeds that wait or rest are counted alone."""


class Aggregates:
    """``sites/<site>/seeds_<stage>`` and, of the columns in ``MEANS``, ``…/<column>_<stage>``, at most ``points`` times a run.

    One prefix a site, because MLflow's page has a section for every prefix.

    A stage that was ever seen at a site keeps being counted, so that its curve comes down to zero. Means run over the
    seeds in the stage at that tick whose value is finite: a gain that nobody judged yet, say, is left out.
    """

    def __init__(self, points: int) -> None:
        self._points = points
        self._stride = 1
        self._known: dict[str, set[int]] = {}
        self._next: dict[str, int] = {}

    def plan(self, total_ticks: int) -> None:
        """Spread the points over a run of this length."""
        self._stride = max(1, math.ceil(total_ticks / self._points))

    def go_on(self, said: dict[str, tuple[int, set[int]]]) -> None:
        """By site, the tick at which an earlier session of this run last gave points, and the stages it had seen."""
        for site, (tick, stages) in said.items():
            self._next[site] = tick - tick % self._stride + self._stride
            self._known[site] = set(stages)

    def points(self, message: Telemetry) -> list[Point]:
        """The points of one message that are due."""
        found: list[Point] = []
        values = rows(message)
        for tick, block in zip(message.ticks, values, strict=True):
            if tick >= self._next.get(message.site, 0):
                self._next[message.site] = tick - tick % self._stride + self._stride
                found += self._of_tick(message, tick, block)
        return found

    def _of_tick(self, message: Telemetry, tick: int, block: np.ndarray) -> list[Point]:
        column = {name: block[:, index] for index, name in enumerate(message.columns)}
        stage = column["stage"].astype(np.int64)
        counts = np.bincount(stage, minlength=len(Stage))
        known = self._known.setdefault(message.site, set())
        known.update(np.flatnonzero(counts).tolist())
        found: list[Point] = []
        for code in sorted(known):
            where, word = f"sites/{message.site}", Stage(code).name.lower()
            found.append((tick, f"{where}/seeds_{word}", float(counts[code])))
            members = stage == code
            for name in (name for name, stages in MEANS.items() if code in stages and name in column):
                values = column[name][members]
                values = values[np.isfinite(values)]
                if len(values):
                    found.append((tick, f"{where}/{name}_{word}", float(values.mean())))
        return found
