"""A sweep and its jobs: configs, folders, the outcome of each job, and the state of one start of the sweep."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from esper.compare.config import CompareConfig
from esper.compare.results.comparison import TuningResult, Values, format_values
from esper.compare.results.mlflow_sweep import CURVES, MOST_CURVES
from esper.compare.results.plan import Plan
from esper.compare.results.runs import Run, run_of_summary
from esper.compare.sweep.arms import Job, Layout
from esper.config import PRESETS, RootConfig, config_hash, plain
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.search.space import shown
from esper.tracking.mlflow_run import ASIDE

if TYPE_CHECKING:
    import pandas as pd

JOB, METRICS = "job.json", "metrics.parquet"
OUTPUT = "outputs"  # where esper compare looks unless it is told


@dataclass(frozen=True)
class TuningJob(Job):
    """A job that tries ``values`` for its arm; it is not part of the comparison. Where Optuna proposes them, ``trial`` is their number."""

    values: Values = dataclasses.field(default_factory=dict)
    trial: int = -1

    @property
    def label(self) -> str:
        """A name that a person can read, like ``tuning linear optimizer.lr=0.003 seed=1000000``."""
        return " ".join(part for part in ("tuning", self.arm, self.block, format_values(self.values), f"seed={self.seed}") if part)


@dataclass(frozen=True)
class TrialJob(Job):
    """A job of a search: one seed of trial ``trial``, which tries ``values``, as they would be typed."""

    trial: int = 0
    values: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """A name that a person can read, like ``trial 3 optimizer.lr=0.003 seed=0``."""
        return f"trial {self.trial} {shown(self.values)} seed={self.seed}"


@dataclass(frozen=True)
class PreparedJob:
    """A job with its checked config and its own folder."""

    job: Job
    config: RootConfig
    choices: dict[str, str]
    folder: Path

    def request(self, ask: str) -> dict[str, Any]:
        """The request for a worker."""
        return {"ask": ask, "config": _tree(self.config), "choices": self.choices, "folder": str(self.folder)}

    @property
    def summary(self) -> dict[str, Any]:
        """The summary that the job left, empty where there is none or it is another config's."""
        if not (self.folder / SUMMARY).exists():
            return {}
        found = read_summary(self.folder)
        return found if found.get("config_hash") == config_hash(self.config) else {}

    @property
    def error(self) -> str:
        """Why an earlier attempt failed; empty where none did."""
        path = self.folder / JOB
        note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return note.get("error", "") if note.get("config_hash") == config_hash(self.config) else ""


def _tree(config: RootConfig) -> dict[str, Any]:
    """The config as a worker builds it again: preset names are not settings, and some groups have no options yet."""
    return {key: value for key, value in plain(config).items() if value is not None and key not in PRESETS}


def set_aside(folder: Path) -> None:
    """Keep the files of an unfinished attempt under another name: a retry starts in an empty folder."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}{ASIDE}{number}")).exists():
            number += 1
        folder.rename(aside)


def save_outcome(one: PreparedJob, answer: Mapping[str, Any]) -> None:
    """Write the worker's answer into the job's folder, with the arm and block that the job belongs to."""
    note = {"config_hash": config_hash(one.config), "arm": one.job.arm, "block": one.job.block, **answer}
    one.folder.mkdir(parents=True, exist_ok=True)
    (one.folder / JOB).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def runs_of(jobs: Sequence[PreparedJob], metric: str) -> list[Run]:
    """The jobs that have ended, finished or failed."""
    found = []
    for one in jobs:
        summary, error = one.summary, one.error
        if not summary and not error:
            continue
        status = "FAILED" if error else summary.get("status", "FAILED")
        job = one.job
        found.append(run_of_summary({**summary, "status": status}, metric, job.arm, job.block, job.seed, str(one.folder)))
    return found


def curves_of(jobs: Sequence[PreparedJob], metric: str) -> pd.DataFrame | None:
    """The metric on the validation set over the steps of every job that has ended; None where there is none, or more than a page shows."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    frames = []
    for one in jobs if len(jobs) <= MOST_CURVES else ():
        try:
            named = pq.read_table(one.folder / METRICS, columns=["tick", "value"], filters=[("name", "=", f"validation/{metric}")])
        except (OSError, pa.ArrowException):  # a job that failed before its first look, or whose file is torn
            continue
        frame = named.to_pandas().set_axis(["step", "value"], axis=1).dropna()
        frames.append(frame.assign(arm=one.job.arm, block=one.job.block, run=one.job.label))
    return pd.concat(frames)[CURVES] if frames and any(map(len, frames)) else None


def values_of(one: PreparedJob) -> Values:
    """The values that a tuning job tries."""
    assert isinstance(one.job, TuningJob)
    return one.job.values


@dataclass
class Sweep:
    """Everything that one start of a sweep knows.

    ``command`` has the user's words, for the sentence that says how to resume; ``retry`` runs failed jobs again;
    ``proposed`` jobs are a learning sweeper's, which pairs nothing. ``tuning_jobs`` are the jobs that tune the arms, ``tuned``
    has the results by arm and block. ``minutes`` is the time limit after ``began`` [s of the monotonic clock], 0 for none, and ``left``
    counts the jobs that it left out.
    """

    layout: Layout
    jobs: list[PreparedJob]
    folder: Path
    command: list[str]
    console: Console
    retry: bool = False
    proposed: bool = False
    minutes: float = 0.0
    began: float = field(default_factory=time.monotonic)
    left: int = 0
    id: str = ""
    parent: str = ""
    plan: Plan | None = None
    failures: list[PreparedJob] = field(default_factory=list)
    tuning_jobs: list[PreparedJob] = field(default_factory=list)
    tuned: dict[tuple[str, str], TuningResult] = field(default_factory=dict)

    def finished(self, arm: str, block: str, seed: int) -> dict[str, Any]:
        """The summary of a job, or of a tuning job with the values that were chosen; empty where it did not finish."""
        chosen = self.tuned.get((arm, block))
        for one in (*self.jobs, *(one for one in self.tuning_jobs if chosen and values_of(one) == chosen.values)):
            if (one.job.arm, one.job.block, one.job.seed) == (arm, block, seed):
                return one.summary if one.summary.get("status") == "FINISHED" else {}
        return {}

    @property
    def compare(self) -> CompareConfig:
        """The settings of the comparison."""
        compare: CompareConfig = self.jobs[0].config.compare
        return compare

    @property
    def name(self) -> str:
        """The name of the parent run: the name of its runs, and the arms."""
        arms = ", ".join(self.layout.arms[:4]) + (", …" if len(self.layout.arms) > 4 else "")
        return f"{self.jobs[0].config.name} sweep: {arms}" if self.layout.arms != ("",) else f"{self.jobs[0].config.name} sweep"


def resume_command(sweep: Sweep) -> str:
    """The command that resumes a stopped sweep."""
    words = [word for word in sweep.command if not word.startswith("hydra.sweep.dir=")]
    return shlex.join(["esper", *words, f"hydra.sweep.dir={sweep.folder}"])
