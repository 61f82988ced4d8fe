"""A sweep from its first job to its verdict: plan, tune, run, judge, and write the results."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import Comparison, with_tuned
from esper.compare.results.mlflow_sweep import verdict_metrics, verdict_tags
from esper.compare.results.report import show, write_results
from esper.compare.statistics.power import fewest_pairs
from esper.compare.statistics.sequential import look_pairs
from esper.compare.sweep.arms import Job
from esper.compare.sweep.dependencies import MissingSource, controls_to_train, derive, run_order
from esper.compare.sweep.mlflow_process import MlflowProcess
from esper.compare.sweep.plan_sweep import plan_sweep
from esper.compare.sweep.progress import Progress
from esper.compare.sweep.resume import can_resume, read_note, sweep_lock, write_note
from esper.compare.sweep.sweep import OUTPUT, PreparedJob, Sweep, curves_of, resume_command, runs_of, save_outcome, set_aside
from esper.compare.sweep.tuning import choose, tuning_jobs, with_values
from esper.compare.sweep.worker import LOG
from esper.compare.sweep.worker_pool import WorkerPool
from esper.errors import Preempted, Terminated
from esper.tracking.config import MlflowConfig


def run_sweep(sweep: Sweep, environments: Sequence[Mapping[str, str]]) -> Comparison | None:
    """Run every job that is not done yet and judge the arms; None where there is nothing to compare.

    Args:
        sweep: its jobs, each with a config and a folder.
        environments: environment variables of the workers, one mapping each.

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
            workers = WorkerPool([{**variables, **mlflow.environment} for variables in environments])
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
    _save_note(sweep, ended=not sweep.failures)  # resume=auto finds one whose jobs failed, over a full disk for instance
    return comparison


def _save_note(sweep: Sweep, ended: bool = False) -> None:
    write_note(sweep.folder, {"id": sweep.id, "parent": sweep.parent, "name": sweep.name, "command": sweep.command, "ended": ended})


def run_jobs(sweep: Sweep, workers: WorkerPool, mlflow: MlflowProcess) -> None:
    """All jobs that are left: look by look, and within a look the arms in the order in which they depend on each other."""
    order = run_order(sweep.layout.arms, sweep.compare)
    with Progress(_progress_rows(sweep), sweep.console) as progress:
        runner = _JobRunner(sweep, workers, mlflow, progress)
        for seeds in _looks(sweep):
            for arms in order:
                runner.tune(arms)
                chosen = [i for i, one in enumerate(sweep.jobs) if one.job.arm in arms and one.job.seed in seeds]
                chosen.sort(key=lambda i: sweep.layout.seeds.index(sweep.jobs[i].job.seed))  # pairs complete early
                runner.run(sweep.jobs, chosen)
            if _decided(sweep):
                sweep.console.print("Every comparison is decided: the sweep stops here, as planned.")
                break


class _JobRunner:
    """Runs chosen jobs of a sweep in its workers, and tells the progress table and the MLflow process how they end."""

    def __init__(self, sweep: Sweep, workers: WorkerPool, mlflow: MlflowProcess, progress: Progress) -> None:
        self.sweep, self.workers, self.mlflow, self.progress = sweep, workers, mlflow, progress

    def run(self, jobs: list[PreparedJob], chosen: Sequence[int]) -> None:
        """Run those of the chosen ``jobs`` (the sweep's own, or its tuning jobs) that no earlier start has done."""
        left = [one for index in chosen if (one := self._prepare(jobs, index)) is not None]
        requests = [one.request("run") | {"controls": controls_to_train(one, self.sweep.jobs)} for one in left]
        for index, answer in self.workers.run(requests, lambda i: self.progress.started(left[i].job)):
            one = left[index]
            save_outcome(one, answer)
            if answer["error"]:
                self._failed(one, answer["error"])
            self.progress.finished(one.job, answer["seconds"], answer["error"], str(one.folder / LOG))

    def _prepare(self, jobs: list[PreparedJob], index: int) -> PreparedJob | None:
        """The job, ready to run, with the settings that it takes over from others; None where there is nothing to run."""
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

    def tune(self, arms: Sequence[str]) -> None:
        """Let each of these arms choose its values on validation, in every block; runs once, also when resumed."""
        sweep = self.sweep
        places = [(one.job.arm, one.job.block) for one in sweep.tuning_jobs]
        new = [i for i, place in enumerate(places) if place[0] in arms and place not in sweep.tuned]
        self.run(sweep.tuning_jobs, new)
        for place in dict.fromkeys(places[i] for i in new):
            assert sweep.plan is not None
            tried = [one for one, its in zip(sweep.tuning_jobs, places, strict=True) if its == place]
            found = sweep.tuned[place] = choose(tried, sweep.plan.metric, sweep.plan.sign)
            sweep.console.print(found.sentence(sweep.plan.metric), highlight=False, soft_wrap=True, markup=False)
            for i, one in enumerate(sweep.jobs):
                if (one.job.arm, one.job.block) == place:
                    sweep.jobs[i] = replace(one, config=with_values(one.config, found.values, one.choices))


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
    """The comparison of the jobs that have ended; None where the sweep has no plan."""
    if sweep.plan is None:
        return None
    return with_tuned(analyse(runs_of(sweep.jobs, sweep.plan.metric), sweep.plan), list(sweep.tuned.values()))


def _say_how_to_judge_again(sweep: Sweep) -> None:
    """Print the command that judges the sweep by its id; nothing where no store keeps the runs."""
    config = sweep.jobs[0].config
    if not isinstance(config.tracking, MlflowConfig):
        return
    words = ["esper", "compare", f"sweep={sweep.id}"]
    words += [f"uri={config.tracking.uri}"] if config.tracking.uri else []
    words += [f"output={config.output}"] if config.output != OUTPUT else []
    sweep.console.print(f"To judge this sweep again from the store:\n  {shlex.join(words)}", soft_wrap=True, highlight=False, markup=False)
