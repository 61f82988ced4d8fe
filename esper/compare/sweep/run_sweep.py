"""A sweep from its jobs to its verdict: plan, run, analyse, keep."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from esper.compare.results import mlflow_sweep as page
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import Comparison, with_tuned
from esper.compare.results.report import show, write_results
from esper.compare.statistics.power import fewest_pairs
from esper.compare.statistics.sequential import look_pairs
from esper.compare.sweep.arms import Job
from esper.compare.sweep.dependencies import Missing, derive, shown, waves
from esper.compare.sweep.mlflow_process import Store
from esper.compare.sweep.plan_sweep import plan_sweep
from esper.compare.sweep.progress import Progress
from esper.compare.sweep.resume import NOTE, alone, goes_on, known
from esper.compare.sweep.sweep import OUTPUT, Prepared, Sweep, note, resume_command, runs_of, set_aside
from esper.compare.sweep.tuning import choose, trials, with_values
from esper.compare.sweep.worker import LOG
from esper.compare.sweep.worker_pool import Workers
from esper.errors import Preempted, Terminated
from esper.tracking.config import MlflowConfig


def run_sweep(sweep: Sweep, environments: Sequence[Mapping[str, str]]) -> Comparison | None:
    """Run what is not done yet, and judge; None where there is only one arm.

    Raises:
        UserError: no plan can be made, or all runs failed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when everything has been stopped and the way on has been said;
            Preempted after a SIGTERM where every job that was under way has saved what it did.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with alone(sweep.folder):
        begun = _recall(sweep)
        with Store(sweep) as store:
            workers = Workers([{**e, **store.environment} for e in environments])
            try:
                return _run(sweep, store, workers, begun)
            except Terminated as stop:
                if workers.saved:
                    raise Preempted(resume_command(sweep)) from stop
                raise


def _run(sweep: Sweep, store: Store, workers: Workers, begun: bool) -> Comparison | None:
    with workers:
        sweep.plan = plan_sweep(sweep, workers)
        if sweep.plan is not None:
            sweep.trials = trials(sweep.jobs, sweep.plan.tune_seeds, sweep.folder)
        store.open()
        if begun:  # not before everything that may refuse it
            sweep.console.print(f"Going on with the sweep in {sweep.folder}", highlight=False, soft_wrap=True)
        _remember(sweep)
        try:
            _run_jobs(sweep, workers, store)
        except KeyboardInterrupt:
            store.status = "KILLED"
            sweep.console.print(f"Stopped; what is done is kept. Go on with:\n  {resume_command(sweep)}", soft_wrap=True)
            raise
        comparison = _judge(sweep)
        if comparison is not None:
            assert sweep.plan is not None
            store.files = write_results(comparison, sweep.plan, sweep.folder, sweep.compare.figures)
            store.numbers, store.tags = page.numbers(comparison, sweep.plan), page.tags(comparison, sweep.plan)
            show(comparison, sweep.plan, sweep.console)
            _say_how_to_judge_again(sweep)
        store.status = "FINISHED"
        _remember(sweep, ended=not sweep.failures)  # resume=auto finds one whose jobs failed, over a full disk for instance
        return comparison


def _recall(sweep: Sweep) -> bool:
    """Identity of a sweep that was begun before in this folder, or a new one; whether it was."""
    note = known(sweep.folder)
    sweep.id = note.get("id") or secrets.token_hex(4)
    sweep.parent = note.get("parent", "")
    return bool(note)


def _remember(sweep: Sweep, ended: bool = False) -> None:
    card = {"id": sweep.id, "parent": sweep.parent, "name": sweep.name, "command": sweep.command, "ended": ended}
    beside = sweep.folder / f".{NOTE}"
    beside.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    beside.replace(sweep.folder / NOTE)


def _run_jobs(sweep: Sweep, workers: Workers, store: Store) -> None:
    """All that is left to do: look by look, within it the arms in the order in which they depend on each other."""
    order = waves(sweep.layout.arms, sweep.compare)
    with Progress(_rows(sweep), sweep.console) as progress:
        for seeds in _looks(sweep):
            for arms in order:
                _tune(sweep, arms, workers, store, progress)
                chosen = [i for i, one in enumerate(sweep.jobs) if one.job.arm in arms and one.job.seed in seeds]
                chosen.sort(key=lambda i: sweep.layout.seeds.index(sweep.jobs[i].job.seed))  # pairs complete early
                _run_some(sweep, sweep.jobs, chosen, workers, store, progress)
            if _decided(sweep):
                sweep.console.print("Every comparison is decided: the sweep stops here, as planned.")
                break


def _rows(sweep: Sweep) -> dict[str, list[Job]]:
    """What the progress table shows: a row an arm, and one for the tuning of each."""
    rows: dict[str, list[Job]] = {}
    for one in sweep.trials:
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


def _run_some(sweep: Sweep, jobs: list[Prepared], chosen: Sequence[int], workers: Workers, store: Store, progress: Progress) -> None:
    """Run those of the chosen ``jobs`` (the sweep's own, or its tuning jobs) that no earlier start has done."""
    left: list[Prepared] = []
    for index in chosen:
        try:
            one = jobs[index] = derive(jobs[index], sweep.finished)
        except Missing as missing:
            one = jobs[index]
            note(one, {"status": "FAILED", "error": str(missing)})
            _failed(sweep, one, str(missing), store)
            progress.finished(one.job, 0.0, str(missing), "none, it did not run")
            continue
        if one.summary.get("status") == "FINISHED":
            progress.kept(one.job, "kept")
        elif one.error and not sweep.retry:
            progress.kept(one.job, "failed")
            sweep.failures.append(one)
        else:
            _make_room(sweep, one)
            left.append(one)
    requests = [one.request("run") | {"controls": shown(one, sweep.jobs)} for one in left]
    for index, answer in workers.run(requests, lambda i: progress.started(left[i].job)):
        one = left[index]
        note(one, answer)
        if answer["error"]:
            _failed(sweep, one, answer["error"], store)
        progress.finished(one.job, answer["seconds"], answer["error"], str(one.folder / LOG))


def _make_room(sweep: Sweep, one: Prepared) -> None:
    """A job that was interrupted goes on where it was; any other begins in an empty folder, a failed one too."""
    if not one.error and goes_on(one.config, one.folder):
        sweep.console.print(f"{one.job.label} goes on from its newest checkpoint", highlight=False, soft_wrap=True)
    else:
        set_aside(one.folder)


def _failed(sweep: Sweep, one: Prepared, error: str, store: Store) -> None:
    sweep.failures.append(one)
    store.failed(one, error)


def _tune(sweep: Sweep, arms: Sequence[str], workers: Workers, store: Store, progress: Progress) -> None:
    """Let each of these arms choose its values on validation, in every block; runs once, also when resumed."""
    places = [(one.job.arm, one.job.block) for one in sweep.trials]
    new = [i for i, place in enumerate(places) if place[0] in arms and place not in sweep.tuned]
    _run_some(sweep, sweep.trials, new, workers, store, progress)
    for place in dict.fromkeys(places[i] for i in new):
        assert sweep.plan is not None
        tried = [one for one, its in zip(sweep.trials, places, strict=True) if its == place]
        found = sweep.tuned[place] = choose(tried, sweep.plan.metric, sweep.plan.sign)
        sweep.console.print(found.sentence(sweep.plan.metric), highlight=False, soft_wrap=True, markup=False)
        for i, one in enumerate(sweep.jobs):
            if (one.job.arm, one.job.block) == place:
                sweep.jobs[i] = replace(one, config=with_values(one.config, found.values, one.choices))


def _decided(sweep: Sweep) -> bool:
    """Whether a sequential sweep may stop: no comparison is left without a verdict."""
    if sweep.plan is None or not sweep.plan.sequential:
        return False
    runs = runs_of(sweep.jobs, sweep.plan.metric)
    if all(run.failed for run in runs):
        return False
    return all(row.verdict in ("B better", "A better") for row in analyse(runs, sweep.plan).verdicts)


def _judge(sweep: Sweep) -> Comparison | None:
    if sweep.plan is None:
        return None
    return with_tuned(analyse(runs_of(sweep.jobs, sweep.plan.metric), sweep.plan), list(sweep.tuned.values()))


def _say_how_to_judge_again(sweep: Sweep) -> None:
    """The sweep's id, in the command that takes it; nothing where no store keeps the runs."""
    config = sweep.jobs[0].config
    if not isinstance(config.tracking, MlflowConfig):
        return
    words = ["esper", "compare", f"sweep={sweep.id}"]
    words += [f"uri={config.tracking.uri}"] if config.tracking.uri else []
    words += [f"output={config.output}"] if config.output != OUTPUT else []
    sweep.console.print(f"To judge this sweep again from the store:\n  {shlex.join(words)}", soft_wrap=True, highlight=False, markup=False)
