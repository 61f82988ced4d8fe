"""Which job of a sweep is next: what it waits for, which pairs come first, and what still fits into the time that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from esper.compare.sweep.dependencies import run_order, sources
from esper.compare.sweep.sweep import PreparedJob, Sweep, TuningJob
from esper.compare.sweep.tuning import startup


class Entry(NamedTuple):
    """A place in the sweep's tuning jobs, or in its own jobs."""

    tuning: bool
    at: int


Place = tuple[str, str]
Group = tuple[str, int]
"""A block and a seed of its pairs; the block's tuning belongs to the first. A group is begun whole or not at all."""


class JobQueue:
    """Jobs in the order in which they may begin: seed by seed, so that pairs are complete early, the tuning of a block before its first.

    A job waits for the tuning of its arm and for the jobs that it takes something over from; a trial of a tuning that learns waits for
    those before it. Where the sweep has a time limit, a group whose last job would end after it is not begun. A job is taken to need as
    long a step as those of its arm and block did so far.
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
        self._startup = startup(sweep.compare.tune_trials)
        self._trials = Counter(self._trial(Entry(True, i)) for i in range(len(sweep.tuning_jobs)))  # jobs that have not ended
        self._paces: dict[Place, list[float]] = {}  # seconds a step, or an epoch, of jobs that have ended
        self._known: dict[Place, float] = {}  # what they tell of others
        self._begun: set[Group] = set()

    def add(self, seeds: set[int]) -> None:
        """Queue the sweep's jobs with these seeds."""
        found = (Entry(False, i) for i, one in enumerate(self.sweep.jobs) if one.job.seed in seeds)
        self.waiting += sorted(found, key=self._order)

    def place(self, entry: Entry) -> tuple[list[PreparedJob], int]:
        """The list that the job is in, and where."""
        return (self.sweep.tuning_jobs if entry.tuning else self.sweep.jobs), entry.at

    def job(self, entry: Entry) -> PreparedJob:
        """The job as it is now."""
        jobs, index = self.place(entry)
        return jobs[index]

    def next(self) -> Entry | None:
        """The next job, which counts as running from here on; None while no job can begin."""
        fits: dict[Group, bool] = {}
        for entry in self.waiting:
            if self._is_ready(entry) and self._may_begin(self._group(entry), fits):
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
            self._paces.setdefault(place, []).append(seconds / self._length(entry))
            self._known.clear()
        if not entry.tuning:
            self._over.add((*place, job.seed))
            return None
        self._open[place] -= 1
        self._trials[self._trial(entry)] -= 1
        return None if self._open[place] else place

    def trial_is_over(self, entry: Entry) -> bool:
        """Whether this tuning job was the last of its trial to end."""
        return not self._trials[self._trial(entry)]

    def _trial(self, entry: Entry) -> tuple[Place, int]:
        job = self.job(entry).job
        assert isinstance(job, TuningJob)
        return (job.arm, job.block), job.trial

    def _order(self, entry: Entry) -> tuple[int, ...]:
        job, layout = self.job(entry).job, self.sweep.layout
        arm = (self.levels[job.arm], layout.arms.index(job.arm), entry.at)
        return 0 if entry.tuning else layout.seeds.index(job.seed), layout.blocks.index(job.block), not entry.tuning, *arm

    def _is_ready(self, entry: Entry) -> bool:
        job = self.job(entry).job
        needed = sources(job.arm, self.sweep.compare)
        tuned = [*needed] if entry.tuning else [job.arm, *needed]
        if any(self._open.get((arm, job.block)) for arm in tuned):
            return False
        if entry.tuning:
            place, trial = self._trial(entry)
            return trial < self._startup or not any(self._trials[(place, earlier)] for earlier in range(trial))
        return all((arm, job.block, job.seed) in self._over for arm in needed)

    # --- the time limit ---

    def _group(self, entry: Entry) -> Group:
        job = self.job(entry).job
        return job.block, self.sweep.layout.seeds[0] if entry.tuning else job.seed

    def _may_begin(self, group: Group, fits: dict[Group, bool]) -> bool:
        """Whether the group is begun, or there is time for it; ``fits`` keeps what was found of each group just now."""
        if self.end is None or group in self._begun:
            return True
        if group not in fits:
            fits[group] = self._would_end(group) <= self.end
        if fits[group]:
            self._begun.add(group)
        return fits[group]

    def _would_end(self, group: Group) -> float:
        """When the last job of the group would end, were it begun now, behind all that has begun."""
        now = self.clock()
        before = sum(max(0.0, self._seconds(entry) - (now - since)) for entry, since in self.running.items())
        before += sum(self._seconds(entry) for entry in self.waiting if self._group(entry) in self._begun)
        mine = [entry for entry in self.waiting if self._group(entry) == group]
        chain: dict[tuple[bool, int], float] = {}  # the longest job of every level: a level waits for the one before, and for tuning
        for entry in mine:
            level = (entry.tuning, self.levels[self.job(entry).job.arm])
            chain[level] = max(chain.get(level, 0.0), self._seconds(entry))
        return now + before / self.workers + max(sum(map(self._seconds, mine)) / self.workers, sum(chain.values()))

    def _seconds(self, entry: Entry) -> float:
        """How long the job will last at the pace of its like: of its arm and block, else of its arm, else of any; 0 where none is known."""
        job = self.job(entry).job
        place = (job.arm, job.block)
        if place not in self._known:
            of_arm = [pace for (arm, _), some in self._paces.items() if arm == job.arm for pace in some]
            paces = self._paces.get(place) or of_arm or [pace for some in self._paces.values() for pace in some]
            self._known[place] = median(paces) if paces else 0.0
        return self._length(entry) * self._known[place]

    def _length(self, entry: Entry) -> int:
        trainer = self.job(entry).config.trainer
        length: int = trainer.steps or trainer.epochs
        return length
