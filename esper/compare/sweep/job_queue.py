"""Which job of a sweep is next: what it waits for, which pairs come first, and what still fits into the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from esper.compare.sweep.dependencies import run_order, sources
from esper.compare.sweep.sweep import PreparedJob, Sweep


class Entry(NamedTuple):
    """A place in the sweep's tuning jobs, or in its own jobs."""

    tuning: bool
    index: int


Place = tuple[str, str]
Group = tuple[str, int | None]
"""A block, and the seed of its pairs; None for the block's tuning. A group is begun whole or not at all."""


class JobQueue:
    """Jobs in the order in which they may begin: tuning, then the pairs seed by seed, so that pairs are complete early.

    A job waits for the tuning of its arm, and for the jobs that it takes something over from. Where the sweep has a time limit, a group
    whose last job would end after it is not begun. Jobs last as long as the longest of their arm and block so far.
    """

    def __init__(self, sweep: Sweep, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.sweep, self.workers, self.clock = sweep, workers, clock
        self.end = sweep.began + 60.0 * sweep.minutes if sweep.minutes else None
        self.levels = {arm: level for level, arms in enumerate(run_order(sweep.layout.arms, sweep.compare)) for arm in arms}
        self.waiting = sorted((Entry(True, i) for i in range(len(sweep.tuning_jobs))), key=self._order)
        self.running: dict[Entry, float] = {}
        self._over: set[tuple[str, str, int]] = set()  # jobs of the comparison that have ended
        self._open: dict[Place, int] = {}  # tuning jobs that have not ended
        for one in sweep.tuning_jobs:
            self._open[(one.job.arm, one.job.block)] = self._open.get((one.job.arm, one.job.block), 0) + 1
        self._longest: dict[Place, float] = {}
        self._begun: set[Group] = set()
        self._refused: set[Group] = set()

    def add(self, seeds: set[int]) -> None:
        """Queue the sweep's jobs with these seeds."""
        found = (Entry(False, i) for i, one in enumerate(self.sweep.jobs) if one.job.seed in seeds)
        self.waiting += sorted(found, key=self._order)

    def place(self, entry: Entry) -> tuple[list[PreparedJob], int]:
        """The list that the job is in, and where."""
        return (self.sweep.tuning_jobs if entry.tuning else self.sweep.jobs), entry.index

    def job(self, entry: Entry) -> PreparedJob:
        """The job as it is now."""
        jobs, index = self.place(entry)
        return jobs[index]

    def next(self) -> Entry | None:
        """The next job, which counts as running from here on; None while no job can begin."""
        for entry in self.waiting:
            if self._is_ready(entry) and self._fits(entry):
                self.waiting.remove(entry)
                self.running[entry] = self.clock()
                return entry
        return None

    def ended(self, entry: Entry, seconds: float | None = None) -> Place | None:
        """Note the end of a job, after ``seconds`` where it ran; the arm and block that have all their tuning jobs behind them now."""
        job = self.job(entry).job
        place = (job.arm, job.block)
        del self.running[entry]
        if seconds is not None:
            self._longest[place] = max(seconds, self._longest.get(place, 0.0))
        if not entry.tuning:
            self._over.add((*place, job.seed))
            return None
        self._open[place] -= 1
        return None if self._open[place] else place

    def _order(self, entry: Entry) -> tuple[int, ...]:
        job, layout = self.job(entry).job, self.sweep.layout
        arm = (self.levels[job.arm], layout.arms.index(job.arm), entry.index)
        block = layout.blocks.index(job.block)
        return (block, *arm) if entry.tuning else (layout.seeds.index(job.seed), block, *arm)

    def _is_ready(self, entry: Entry) -> bool:
        job = self.job(entry).job
        needed = sources(job.arm, self.sweep.compare)
        tuned = [*needed] if entry.tuning else [job.arm, *needed]
        if any(self._open.get((arm, job.block)) for arm in tuned):
            return False
        return entry.tuning or all((arm, job.block, job.seed) in self._over for arm in needed)

    # --- the time limit ---

    def _group(self, entry: Entry) -> Group:
        job = self.job(entry).job
        return job.block, None if entry.tuning else job.seed

    def _fits(self, entry: Entry) -> bool:
        group = self._group(entry)
        if self.end is None or group in self._begun:
            return True
        if group in self._refused or self._would_end(group) > self.end:
            self._refused.add(group)
            return False
        self._begun.add(group)
        return True

    def _would_end(self, group: Group) -> float:
        """When the last job of the group would end, were it begun now, behind all that has begun."""
        now = self.clock()
        before = sum(max(0.0, self._seconds(entry) - (now - since)) for entry, since in self.running.items())
        before += sum(self._seconds(entry) for entry in self.waiting if self._group(entry) in self._begun)
        mine = [entry for entry in self.waiting if self._group(entry) == group]
        chain = dict.fromkeys(self.levels.values(), 0.0)  # the longest job of every level: a level waits for the one before
        for entry in mine:
            level = self.levels[self.job(entry).job.arm]
            chain[level] = max(chain[level], self._seconds(entry))
        return now + before / self.workers + max(sum(map(self._seconds, mine)) / self.workers, sum(chain.values()))

    def _seconds(self, entry: Entry) -> float:
        """How long the job will last; 0 where no job of its block has ended yet."""
        job = self.job(entry).job
        own = self._longest.get((job.arm, job.block))
        return own if own is not None else max((s for place, s in self._longest.items() if place[1] == job.block), default=0.0)
