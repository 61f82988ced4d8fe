"""A sweep from its jobs to its verdict: plan, run, analyse, keep."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.compare.analysis import Comparison, analyse
from esper.compare.arms import Layout
from esper.compare.config import CompareConfig
from esper.compare.going_on import NOTE, alone, goes_on
from esper.compare.jobs import Prepared, note, runs_of, set_aside
from esper.compare.plan import Plan, make_plan, save_plan
from esper.compare.power import fewest_pairs
from esper.compare.progress import Progress
from esper.compare.report import show, write_results
from esper.compare.sequential import look_pairs
from esper.compare.tracking import Store
from esper.compare.tuning import best, trials, with_values
from esper.compare.waves import Missing, derive, waves
from esper.compare.worker import LOG
from esper.compare.workers import Workers
from esper.config import plain
from esper.errors import Preempted, Terminated, UserError
from esper.tracking.record import flatten


@dataclass
class Sweep:
    """Everything that one start of a sweep knows.

    ``command`` is what the user typed, for the sentence that says how to go on; ``retry`` runs failed jobs again.
    """

    layout: Layout
    jobs: list[Prepared]
    folder: Path
    command: list[str]
    console: Console
    retry: bool = False
    id: str = ""
    parent: str = ""
    plan: Plan | None = None
    failures: list[Prepared] = field(default_factory=list)
    tuned: dict[tuple[str, str], list[Prepared]] = field(default_factory=dict)

    def finished(self, arm: str, block: str, seed: int) -> dict[str, Any]:
        """The summary of a job or of a tuning job, empty where it did not finish."""
        for one in (*self.tuned.get((arm, block), []), *self.jobs):
            if (one.job.arm, one.job.block, one.job.seed) == (arm, block, seed):
                return one.summary if one.summary.get("status") == "FINISHED" else {}
        return {}

    @property
    def compare(self) -> CompareConfig:
        """How the sweep is judged."""
        return self.jobs[0].config.compare

    @property
    def name(self) -> str:
        """What the parent run is called: what runs, and which arms."""
        arms = ", ".join(self.layout.arms[:4]) + (", …" if len(self.layout.arms) > 4 else "")
        return f"{self.jobs[0].config.name} sweep: {arms}" if self.layout.arms != ("",) else f"{self.jobs[0].config.name} sweep"


def run_sweep(sweep: Sweep, environments: Sequence[Mapping[str, str]]) -> Comparison | None:
    """Run what is not done yet, and judge; None where there is only one arm.

    Raises:
        UserError: no plan can be made, or all runs failed.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when everything has been stopped and the way on has been said;
            Preempted after a SIGTERM where every job that was under way has saved what it did.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with alone(sweep.folder):
        _recall(sweep)
        with Store(sweep) as store:
            workers = Workers([{**e, **store.environment} for e in environments])
            try:
                return _run(sweep, store, workers)
            except Terminated as stop:
                if workers.saved:
                    raise Preempted(resume_command(sweep)) from stop
                raise


def _run(sweep: Sweep, store: Store, workers: Workers) -> Comparison | None:
    with workers:
        sweep.plan = _plan(sweep, workers)
        store.open()
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
            store.files, store.numbers = _keep(comparison, sweep.plan, sweep)
            show(comparison, sweep.plan, sweep.console)
        store.status = "FINISHED"
        _remember(sweep, ended=True)
        return comparison


def _recall(sweep: Sweep) -> None:
    """Identity of a sweep that was begun before in this folder, or a new one."""
    path = sweep.folder / NOTE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sweep.id = known.get("id") or secrets.token_hex(4)
    sweep.parent = known.get("parent", "")
    if known:
        sweep.console.print(f"Going on with the sweep in {sweep.folder}", highlight=False, soft_wrap=True)


def _remember(sweep: Sweep, ended: bool = False) -> None:
    known = {"id": sweep.id, "parent": sweep.parent, "name": sweep.name, "command": sweep.command, "ended": ended}
    beside = sweep.folder / f".{NOTE}"
    beside.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    beside.replace(sweep.folder / NOTE)


def _plan(sweep: Sweep, workers: Workers) -> Plan | None:
    """Make the plan, say what it can show, and save it before the first run."""
    if len(sweep.layout.arms) < 2:
        what = "its values make blocks (compare.block)" if len(sweep.layout.blocks) > 1 else "only the seed varies"
        sweep.console.print(f"One arm: {what}, so the sweep runs but there is nothing to compare.", highlight=False)
        return None
    known = workers.ask(sweep.jobs[0].request("describe"))
    if known.get("error"):
        raise UserError(known["error"])
    metric = sweep.compare.metric or known["primary"]
    if metric not in known["directions"] and sweep.compare.direction == "auto":
        names = ", ".join(known["directions"])
        raise UserError(f"compare.metric={metric} is no metric of the task, which has {names}; name one of them.")
    plan = make_plan(
        sweep.compare,
        arms=arm_settings(sweep.jobs),
        seeds=sweep.layout.seeds,
        blocks=sweep.layout.blocks,
        metric=metric,
        direction=known["directions"].get(metric, ""),
    )
    save_plan(plan, sweep.folder)
    for line in plan.statement():
        sweep.console.print(line, highlight=False, soft_wrap=True)
    for name, settings in plan.arms.items():
        if name != plan.reference and settings == plan.arms[plan.reference]:
            sweep.console.print(f"{name} and {plan.reference} differ in nothing: an A/A test.", highlight=False)
    return plan


def arm_settings(jobs: Sequence[Prepared]) -> dict[str, dict[str, Any]]:
    """For every arm the settings, flattened, in which the arms' first jobs differ."""
    first: dict[str, dict[str, Any]] = {}
    unlike = ("name", "tags", "output", "tracking", "compare", "experiment", "arm", "debug", "seed")
    for one in jobs:
        if one.job.arm not in first:
            first[one.job.arm] = flatten({k: v for k, v in plain(one.config).items() if k not in unlike})
    keys = sorted({key for settings in first.values() for key in settings})
    differing = [key for key in keys if len({json.dumps(s.get(key), sort_keys=True) for s in first.values()}) > 1]
    found = {arm: {key: settings[key] for key in differing if key in settings} for arm, settings in first.items()}
    compare = jobs[0].config.compare
    for name, taken in (("final_of", compare.final_of), ("equal_macs", compare.equal_macs)):
        for arm in found.keys() & taken.keys():
            found[arm][f"compare.{name}"] = taken[arm]
    return found


def _run_jobs(sweep: Sweep, workers: Workers, store: Store) -> None:
    """All that is left to do: look by look, within it the arms in the order in which they depend on each other."""
    order = waves(sweep.layout.arms, sweep.compare)
    with Progress([one.job for one in sweep.jobs], sweep.console) as progress:
        for seeds in _looks(sweep):
            for arms in order:
                if sweep.plan is not None and sweep.plan.tune:
                    _tune(sweep, arms, workers)
                chosen = [i for i, one in enumerate(sweep.jobs) if one.job.arm in arms and one.job.seed in seeds]
                chosen.sort(key=lambda i: sweep.layout.seeds.index(sweep.jobs[i].job.seed))  # pairs complete early
                _run_some(sweep, chosen, workers, store, progress)
            if _decided(sweep):
                sweep.console.print("Every comparison is decided: the sweep stops here, as planned.")
                break


def _looks(sweep: Sweep) -> list[set[int]]:
    """The seeds up to each look of a sequential sweep; all at once otherwise."""
    seeds, plan = sweep.layout.seeds, sweep.plan
    if plan is None or not plan.sequential:
        return [set(seeds)]
    looks = look_pairs(len(seeds), plan.looks, fewest_pairs(plan.alpha, plan.comparisons))
    return [set(seeds[a:b]) for a, b in pairwise([0, *looks])]


def _run_some(sweep: Sweep, chosen: Sequence[int], workers: Workers, store: Store, progress: Progress) -> None:
    """Run those of the chosen jobs that no earlier start has done."""
    left: list[Prepared] = []
    for index in chosen:
        try:
            one = sweep.jobs[index] = derive(sweep.jobs[index], sweep.finished)
        except Missing as missing:
            one = sweep.jobs[index]
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
    for index, answer in workers.run([one.request("run") for one in left], lambda i: progress.started(left[i].job)):
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


def _tune(sweep: Sweep, arms: Sequence[str], workers: Workers) -> None:
    """Let each of these arms choose its values on validation, in every block; runs once, also when resumed."""
    assert sweep.plan is not None
    for arm in arms:
        for block in sweep.layout.blocks:
            if (arm, block) in sweep.tuned:
                continue
            mine = [i for i, one in enumerate(sweep.jobs) if (one.job.arm, one.job.block) == (arm, block)]
            tried = trials(sweep.jobs[mine[0]], sweep.plan.tune_seeds, sweep.folder)
            tried = [(values, derive(one, sweep.finished)) for values, one in tried]
            left = [one for _, one in tried if one.summary.get("status") != "FINISHED"]
            for one in left:
                _make_room(sweep, one)
            for index, answer in workers.run([one.request("run") for one in left]):
                note(left[index], answer)
            values = best(tried, sweep.plan.metric, sweep.plan.sign)
            sweep.tuned[(arm, block)] = [one for given, one in tried if given == values]
            told = ", ".join(f"{key}={value}" for key, value in values.items())
            sweep.console.print(f"tuned {arm} {block}: {told} ({len(tried)} runs on validation)", highlight=False)
            for i in mine:
                one = sweep.jobs[i]
                sweep.jobs[i] = replace(one, config=with_values(one.config, values, one.choices))


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
    return analyse(runs_of(sweep.jobs, sweep.plan.metric), sweep.plan)


def _keep(comparison: Comparison, plan: Plan, sweep: Sweep) -> tuple[list[Path], dict[str, float]]:
    """Write ``comparison.json``, the table and the figures; the files, and the numbers for the parent run."""
    files = write_results(comparison, plan, sweep.folder, sweep.compare.figures)
    numbers = {f"arm/{arm.arm or 'all'}/{plan.metric}": arm.mean for arm in comparison.arms if arm.points}
    return files, numbers


def resume_command(sweep: Sweep) -> str:
    """What to type to go on with a stopped sweep."""
    words = [word for word in sweep.command if not word.startswith("hydra.sweep.dir=")]
    return shlex.join(["esper", *words, f"hydra.sweep.dir={sweep.folder}"])
