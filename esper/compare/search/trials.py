"""The trials of a search as jobs: which runs next, what its reports mean, and what it was worth."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.compare.sweep.sweep import PreparedJob
from esper.search.config import COSTS, QUALITY, SearchConfig
from esper.search.study import Proposal, Study

DONE, FAILED, PRUNED = "finished", "failed", "pruned"
PARAMETERS, MACS = COSTS


@dataclass(frozen=True)
class Goal:
    """What a search looks for: a validation metric with its direction, and the objectives made of it and of costs."""

    metric: str
    direction: str
    objectives: tuple[str, ...]

    @property
    def directions(self) -> list[str]:
        """``max`` or ``min`` of every objective."""
        return [self.direction if one == QUALITY else "min" for one in self.objectives]

    @property
    def sign(self) -> float:
        """1 where larger is better, else −1."""
        return 1.0 if self.direction == "max" else -1.0

    def measured(self, summary: Mapping[str, Any]) -> dict[str, float]:
        """Quality, parameters and MACs of a finished run, NaN where there is no number, and the metric on the test set where it has one."""
        final = (summary.get("metrics") or {}).get("final") or {}
        found = {QUALITY: final.get(f"validation/{self.metric}"), "test": final.get(f"test/{self.metric}")}
        found |= {PARAMETERS: (summary.get("parameters") or {}).get("after"), MACS: summary.get("macs")}
        return {name: math.nan if value is None else float(value) for name, value in found.items()}


@dataclass
class Trial:
    """A trial under way: its jobs, one a seed, of which the first decides whether the trial is ended early."""

    proposal: Proposal
    jobs: Sequence[PreparedJob]
    waiting: deque[int] = field(default_factory=deque)
    measured: list[dict[str, float]] = field(default_factory=list)


class Trials:
    """Hands out the jobs of a search one by one, and tells the study how its trials end.

    Args:
        study: proposes the trials.
        prepare: a trial's jobs from its proposal.
    """

    def __init__(self, study: Study, settings: SearchConfig, goal: Goal, prepare: Callable[[Proposal], Sequence[PreparedJob]]) -> None:
        self.study, self.settings, self.goal, self._prepare = study, settings, goal, prepare
        self._open: dict[int, Trial] = {}
        self._of_job: dict[int, tuple[int, int]] = {}
        self._again = deque(study.unfinished())

    def next(self) -> PreparedJob | None:
        """The job to run now: a further seed of a trial whose first is done, else one of a new trial; None for none."""
        for trial in self._open.values():
            if trial.measured and trial.waiting:
                return self._begin(trial)
        proposal = self._propose()
        if proposal is None:
            return None
        jobs = self._prepare(proposal)
        trial = self._open[proposal.number] = Trial(proposal, jobs, deque(range(len(jobs))))
        return self._begin(trial)

    def _propose(self) -> Proposal | None:
        if self._again:
            return self._again.popleft()
        return self.study.ask() if len(self.study.trials) < self.settings.n_trials else None

    def _begin(self, trial: Trial) -> PreparedJob:
        at = trial.waiting.popleft()
        job = trial.jobs[at]
        self._of_job[job.job.number] = (trial.proposal.number, at)
        return job

    def goes_on(self, job: PreparedJob, report: Mapping[str, Any]) -> bool:
        """Whether a job goes on after such a report; called by any thread."""
        trial, at = self._of_job[job.job.number]
        late = report["step"] >= self.settings.prune_after / 100 * report["of"]
        value = report["values"].get(f"validation/{self.goal.metric}")
        if at > 0 or not late or value is None:
            return True
        return not self.study.report(trial, int(report["step"]), float(value))

    def ended(self, job: PreparedJob, status: str, summary: Mapping[str, Any]) -> str:
        """Note how a job ended; the state of its trial where that is over with it, else nothing."""
        number, _ = self._of_job.pop(job.job.number)
        trial = self._open.get(number)
        if trial is None:  # it has failed with another seed
            return ""
        if status == "PRUNED":
            del self._open[number]
            self.study.note(number, self._numbers(summary))
            self.study.prune(number)
            return PRUNED
        measured = self.goal.measured(summary)
        trial.measured.append(measured)
        if status != "FINISHED" or not math.isfinite(measured[QUALITY]):
            del self._open[number]
            self.study.fail(number)
            return FAILED
        if len(trial.measured) < len(trial.jobs):
            return ""
        del self._open[number]
        means = {name: statistics.fmean(one[name] for one in trial.measured) for name in measured}
        self.study.note(number, {name: value for name, value in means.items() if math.isfinite(value)})
        self.study.finish(number, [means[name] for name in self.goal.objectives])
        return DONE

    def _numbers(self, summary: Mapping[str, Any]) -> dict[str, float]:
        return {name: value for name, value in self.goal.measured(summary).items() if name in COSTS and math.isfinite(value)}
