"""A sweep from its first job to its verdict: plan, tune, run, judge, and write the results."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import Comparison, with_tuned
from esper.compare.results.mlflow_sweep import verdict_metrics, verdict_tags
from esper.compare.results.report import show, write_results
from esper.compare.statistics.power import fewest_pairs
from esper.compare.statistics.sequential import look_pairs
from esper.compare.sweep.arms import Job
from esper.compare.sweep.dependencies import MissingSource, controls_to_train, derive
from esper.compare.sweep.job_queue import Entry, JobQueue
from esper.compare.sweep.mlflow_process import MlflowProcess
from esper.compare.sweep.plan_sweep import plan_sweep
from esper.compare.sweep.progress import Progress
from esper.compare.sweep.resume import can_resume, read_note, sweep_lock, write_note
from esper.compare.sweep.sweep import OUTPUT, PreparedJob, Sweep, curves_of, resume_command, runs_of, save_outcome, set_aside
from esper.compare.sweep.tuning import choose, tuning_jobs, with_values
from esper.compare.sweep.worker import LOG
from esper.compare.sweep.worker_pool import WorkerPool
from esper.errors import Preempted, Terminated
from esper.tracking.config import mlflow_in

if TYPE_CHECKING:
    from esper.compare.sweep.tuning_trials import TuningTrials


def run_sweep(sweep: Sweep, start: Callable[[Mapping[str, str]], WorkerPool]) -> Comparison | None:
    """Run every job that is not done yet and judge the arms; None where there is nothing to compare.

    Args:
        sweep: its jobs, each with a config and a folder.
        start: starts the workers; it is given environment variables for each of them.

    Raises:
        UserError: the sweep cannot be judged as asked; before its first run starts.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after everything has been stopped and the command that resumes it has been printed;
            Preempted after a SIGTERM where every job that was under way has saved its state.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with sweep_lock(sweep.folder):
        note = read_note(sweep.folder)
        sweep.id, sweep.parent = note.get("id") or secrets.token_hex(4), note.get("parent", "")
        with MlflowProcess(sweep) as mlflow:
            workers = start(mlflow.environment)
            try:
                with workers:
                    return _plan_run_judge(sweep, workers, mlflow, resumed=bool(note))
            except Terminated as stop:
                if workers.saved:
                    raise Preempted(resume_command(sweep)) from stop
                raise


def _plan_run_judge(sweep: Sweep, workers: WorkerPool, mlflow: MlflowProcess, resumed: bool) -> Comparison | None:
    if sweep.compare.figures:  # drawn at the end: loaded before the first run, while the workers load too
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    sweep.plan = plan_sweep(sweep, workers)
    if sweep.plan is not None:
        sweep.tuning_jobs = tuning_jobs(sweep.jobs, sweep.plan.tune_seeds, sweep.folder)
        _trials_of(sweep)  # refuses what cannot be tuned, before the first run
    mlflow.open()
    if resumed:  # not before everything that may refuse it
        sweep.console.print(f"Going on with the sweep in {sweep.folder}", highlight=False, soft_wrap=True)
    _save_note(sweep)
    try:
        run_jobs(sweep, workers, mlflow)
    except KeyboardInterrupt:
        mlflow.status = "KILLED"
        sweep.console.print(f"Stopped; what is done is kept. Go on with:\n  {resume_command(sweep)}", soft_wrap=True)
        raise
    comparison = judge_sweep(sweep)
    if comparison is not None:
        assert sweep.plan is not None
        curves = curves_of(sweep.jobs, sweep.plan.metric)
        mlflow.files = write_results(comparison, sweep.plan, sweep.folder, sweep.compare.figures, curves)
        mlflow.metrics, mlflow.tags = verdict_metrics(comparison, sweep.plan), verdict_tags(comparison, sweep.plan)
        show(comparison, sweep.plan, sweep.console)
        _say_how_to_judge_again(sweep)
    mlflow.status = "FINISHED"
    _save_note(sweep, ended=not sweep.failures and not sweep.left)  # resume=auto finds one whose jobs failed, over a full disk for instance
    return comparison


def _save_note(sweep: Sweep, ended: bool = False) -> None:
    write_note(sweep.folder, {"id": sweep.id, "parent": sweep.parent, "name": sweep.name, "command": sweep.command, "ended": ended})


def run_jobs(sweep: Sweep, workers: WorkerPool, mlflow: MlflowProcess) -> None:
    """All jobs that are left, look by look, until the sweep is decided or its time is over."""
    with Progress(_progress_rows(sweep), sweep.console) as progress:
        runner = _JobRunner(sweep, workers, mlflow, progress)
        for seeds in _looks(sweep):
            runner.run(seeds)
            if sweep.left:
                sweep.console.print(
                    f"The limit of {sweep.minutes:g} minutes left {sweep.left} jobs out, all those of a pair; go on with:\n  "
                    f"{resume_command(sweep)}",
                    soft_wrap=True,
                    highlight=False,
                )
                break
            if _decided(sweep):
                sweep.console.print("Every comparison is decided: the sweep stops here, as planned.")
                break


class _JobRunner:
    """Runs chosen jobs of a sweep in its workers, and tells the progress table and the MLflow process how they end."""

    def __init__(self, sweep: Sweep, workers: WorkerPool, mlflow: MlflowProcess, progress: Progress) -> None:
        self.sweep, self.workers, self.mlflow, self.progress = sweep, workers, mlflow, progress
        self.queue, self.trials = JobQueue(sweep, workers.size), _trials_of(sweep)

    def run(self, seeds: set[int]) -> None:
        """Run what no earlier start has done of the jobs with these seeds, and of the tuning before them."""
        self.queue.add(seeds)
        begun: list[Entry] = []
        for index, answer in self.workers.run(self._requests(begun), lambda i: self.progress.started(self.queue.job(begun[i]).job)):
            one = self.queue.job(begun[index])
            save_outcome(one, answer)
            if answer["error"]:
                self._failed(one, answer["error"])
            self.progress.finished(one.job, answer["seconds"], answer["error"], str(one.folder / LOG))
            self._ended(begun[index], answer["seconds"])
        self.sweep.left = len(self.queue.waiting)

    def _requests(self, begun: list[Entry]) -> Iterator[dict[str, Any] | None]:
        """A request for every job that is to run, noted in ``begun``; None while all that is left waits for one under way."""
        while self.queue.waiting:
            entry = self.queue.next()
            if entry is None and not self.queue.running:
                return
            one = None if entry is None else self._prepare(*self.queue.place(entry))
            if entry is None:
                yield None
            elif one is None:
                self._ended(entry)
            else:
                begun.append(entry)
                store = self.mlflow.opening(one) if self.workers.away else {}
                yield one.request("run") | {"controls": controls_to_train(one, self.sweep.jobs), "store": store}

    def _ended(self, entry: Entry, seconds: float | None = None) -> None:
        tuned = self.queue.ended(entry, seconds)
        if self.trials is not None and entry.tuning and self.queue.trial_is_over(entry):
            self.trials.learn(self.queue.job(entry), self.sweep.tuning_jobs)
        if tuned:
            self._choose(*tuned)

    def _prepare(self, jobs: list[PreparedJob], index: int) -> PreparedJob | None:
        """The job, ready to run, with the settings that it takes over from others; None where there is nothing to run."""
        if self.trials is not None and jobs is self.sweep.tuning_jobs:
            jobs[index] = self.trials.with_proposal(jobs[index])
            self.mlflow.add(jobs[index])
        try:
            one = jobs[index] = derive(jobs[index], self.sweep.finished)
        except MissingSource as missing:
            one = jobs[index]
            save_outcome(one, {"status": "FAILED", "error": str(missing)})
            self._failed(one, str(missing))
            self.progress.finished(one.job, 0.0, str(missing), "none, it did not run")
            return None
        if one.summary.get("status") == "FINISHED":
            self.progress.kept(one.job, "kept")
            return None
        if one.error and not self.sweep.retry:
            self.progress.kept(one.job, "failed")
            self.sweep.failures.append(one)
            return None
        if not one.error and can_resume(one.config, one.folder):
            self.sweep.console.print(f"{one.job.label} goes on from its newest checkpoint", highlight=False, soft_wrap=True)
        else:  # any other begins in an empty folder, a failed one too
            set_aside(one.folder)
        return one

    def _failed(self, one: PreparedJob, error: str) -> None:
        self.sweep.failures.append(one)
        self.mlflow.failed(one, error)

    def _choose(self, arm: str, block: str) -> None:
        """Let this arm choose its values on validation, from tuning jobs that have all ended; its jobs take them over."""
        sweep = self.sweep
        assert sweep.plan is not None
        tried = [one for one in sweep.tuning_jobs if (one.job.arm, one.job.block) == (arm, block)]
        found = sweep.tuned[(arm, block)] = choose(tried, sweep.plan.metric, sweep.plan.sign)
        sweep.console.print(found.sentence(sweep.plan.metric), highlight=False, soft_wrap=True, markup=False)
        for i, one in enumerate(sweep.jobs):
            if (one.job.arm, one.job.block) == (arm, block):
                sweep.jobs[i] = replace(one, config=with_values(one.config, found.values, one.choices))


def _trials_of(sweep: Sweep) -> TuningTrials | None:
    """What gives the trials of the arms their values; None where nothing is tuned by trials."""
    if sweep.plan is None or not sweep.plan.tune_trials:
        return None
    from esper.compare.sweep.tuning_trials import TuningTrials

    return TuningTrials(sweep.jobs, sweep.compare, sweep.plan.metric, sweep.plan.direction)


def _progress_rows(sweep: Sweep) -> dict[str, list[Job]]:
    """The jobs of every row of the progress table: a row an arm, and one for the tuning of each."""
    rows: dict[str, list[Job]] = {}
    for one in sweep.tuning_jobs:
        rows.setdefault(f"{one.job.arm}, tuning", []).append(one.job)
    for one in sweep.jobs:
        rows.setdefault(one.job.arm, []).append(one.job)
    return rows


def _looks(sweep: Sweep) -> list[set[int]]:
    """The seeds up to each look of a sequential sweep; all at once otherwise."""
    seeds, plan = sweep.layout.seeds, sweep.plan
    if plan is None or not plan.sequential:
        return [set(seeds)]
    looks = look_pairs(len(seeds), plan.looks, fewest_pairs(plan.alpha, plan.comparisons))
    return [set(seeds[a:b]) for a, b in pairwise([0, *looks])]


def _decided(sweep: Sweep) -> bool:
    """Whether a sequential sweep may stop: no comparison is left without a verdict."""
    if sweep.plan is None or not sweep.plan.sequential:
        return False
    runs = runs_of(sweep.jobs, sweep.plan.metric)
    if all(run.failed for run in runs):
        return False
    return all(row.verdict in ("B better", "A better") for row in analyse(runs, sweep.plan).verdicts)


def judge_sweep(sweep: Sweep) -> Comparison | None:
    """The comparison of the jobs that have ended; None where the sweep has no plan, or no time for any of its pairs."""
    runs = runs_of(sweep.jobs, sweep.plan.metric) if sweep.plan is not None else []
    if sweep.plan is None or (sweep.left and not runs):
        return None
    return with_tuned(analyse(runs, sweep.plan, partial=sweep.left > 0), list(sweep.tuned.values()))


def _say_how_to_judge_again(sweep: Sweep) -> None:
    """Print the command that judges the sweep by its id; nothing where no store keeps the runs."""
    config = sweep.jobs[0].config
    mlflow = mlflow_in(config.tracking)
    if mlflow is None:
        return
    words = ["esper", "compare", f"sweep={sweep.id}"]
    words += [f"uri={mlflow.uri}"] if mlflow.uri else []
    words += [f"output={config.output}"] if config.output != OUTPUT else []
    sweep.console.print(f"To judge this sweep again from the store:\n  {shlex.join(words)}", soft_wrap=True, highlight=False, markup=False)
