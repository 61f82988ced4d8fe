"""Making the plan of a sweep from its jobs: every task is asked for its metrics, and the terminal shows the power of the pairs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from esper.compare.results.plan import Plan, make_plan, save_plan
from esper.compare.statistics.power import PILOT_PAIRS
from esper.compare.sweep.sweep import PreparedJob, Sweep
from esper.compare.sweep.worker_pool import WorkerPool
from esper.config import did_you_mean, listing, plain
from esper.errors import UserError
from esper.tracking.run_info import flatten

#: A task's config, its place in the sweep in words, and its answer.
Described = tuple[Any, str, dict[str, Any]]


#: Settings in which the jobs of one sweep may differ without being other arms.
BESIDE = ("name", "tags", "output", "tracking", "compare", "experiment", "arm", "debug", "seed")


def plan_sweep(sweep: Sweep, workers: WorkerPool) -> Plan | None:
    """Make the plan, print the power of its pairs, and save it; None where there is nothing to compare.

    Raises:
        UserError: jobs that ask for different plans, or no metric that every task has and means in the same direction.
    """
    if len(sweep.layout.arms) < 2:
        sweep.console.print(f"{_why_alone(sweep)}, so the sweep runs but there is nothing to compare.", highlight=False)
        return None
    if unlike := [one for one in sweep.jobs if one.config.compare != sweep.compare]:
        raise UserError(
            f"{unlike[0].job.label} sets the keys of compare otherwise than {sweep.jobs[0].job.label}, and a sweep has one plan; "
            "take compare out of the arms' files and give it on the command line."
        )
    tasks = list(_tasks(sweep, workers))
    metric, direction = common_metric(sweep.compare.metric, tasks)
    plan = make_plan(
        sweep.compare,
        arms=arm_settings(sweep.jobs),
        seeds=sweep.layout.seeds,
        blocks=sweep.layout.blocks,
        metric=metric,
        direction=direction,
        about={block: _about([one for one in sweep.jobs if one.job.block == block], tasks) for block in sweep.layout.blocks},
    )
    save_plan(plan, sweep.folder)
    for line in [*plan.statement(), *_pilot(plan, sweep)]:
        sweep.console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name, settings in plan.arms.items():
        if name != plan.reference and settings == plan.arms[plan.reference]:
            sweep.console.print(f"{name} and {plan.reference} differ in nothing: an A/A test.", highlight=False)
    return plan


def _pilot(plan: Plan, sweep: Sweep) -> list[str]:
    """How to learn the spread of the paired differences, where it is not known: as many of them as a pilot must have, with other seeds."""
    if plan.spread > 0 or not sweep.command:
        return []
    first, pairs = max(sweep.layout.seeds) + 1, -(-PILOT_PAIRS // (len(plan.arms) - 1))
    words = [word for word in sweep.command if not word.startswith(("seed=", "hydra.sweep.dir=", "resume="))]
    seeds = f"seed=range({first},{first + pairs})"
    return [
        "To know it, run a pilot and start this sweep again with compare.pilot=<the pilot's folder>/comparison.json:",
        f"  {shlex.join(['esper', *words, seeds])}",
    ]


def _why_alone(sweep: Sweep) -> str:
    if sweep.proposed:
        return "The sweeper proposes its jobs as it learns, and nothing is paired"
    return f"One arm: {'its values make blocks (compare.block)' if len(sweep.layout.blocks) > 1 else 'only the seed varies'}"


def _about(jobs: Sequence[PreparedJob], tasks: Sequence[Described]) -> dict[str, Any]:
    """Task, model and samples of the test set of one block, as far as all its jobs share them."""
    told = [{"task": _called(one, "task"), "model": _called(one, "model"), "samples": _samples(one, tasks)} for one in jobs]
    return {key: value for key, value in told[0].items() if value and all(one[key] == value for one in told)}


def _called(one: PreparedJob, group: str) -> str:
    """The option that was chosen, which says more than the name of its kind; the target of a part of the user's own."""
    part = getattr(one.config, group)
    return str(part.target if part.name == "custom" else one.choices.get(group, part.name))


def _samples(one: PreparedJob, tasks: Sequence[Described]) -> int:
    return next((int(known.get("samples", 0)) for task, _, known in tasks if task == one.config.task), 0)


def common_metric(asked: str, tasks: Sequence[Described]) -> tuple[str, str]:
    """The metric that a sweep is judged by and which way is better, as all of its tasks have it.

    Args:
        asked: ``compare.metric``; empty for the primary metric of the first task.
        tasks: the answers of the tasks.

    Raises:
        UserError: a task without the metric, or two that mean it in opposite directions.
    """
    metric, directions = asked, dict[str, str]()
    for _, where, known in tasks:
        metric = metric or known["primary"]
        if metric not in known["directions"]:
            named = f"compare.metric={metric}" if asked else f"{metric}, the primary metric of the first task,"
            names = list(known["directions"])
            raise UserError(
                f"{named} is no metric of the task{where}, which has {listing(names)}; "
                f"give one that every task of the sweep has, compare.metric=…{did_you_mean(metric, names)}"
            )
        directions.setdefault(known["directions"][metric], where)
    if len(directions) > 1:
        told = " and ".join(f"{direction}{where}" for direction, where in directions.items())
        raise UserError(f"The direction of {metric} is {told}, and a sweep is judged in one; give each of these tasks a sweep of its own.")
    return metric, next(iter(directions))


def _tasks(sweep: Sweep, workers: WorkerPool) -> Iterator[Described]:
    """The answer of each distinct task of the sweep, asked of the first job of every arm and block."""
    asked: list[Any] = []
    seen: set[tuple[str, str]] = set()
    for one in sweep.jobs:
        place = (one.job.arm, one.job.block)
        if place in seen or one.config.task in asked:
            continue
        seen.add(place)
        known = workers.ask(one.request("describe"))
        if known.get("error"):
            raise UserError(known["error"])
        where = one.job.block or (one.job.arm if asked else "")
        asked.append(one.config.task)
        yield one.config.task, f" of {where}" if where else "", known


def arm_settings(jobs: Sequence[PreparedJob]) -> dict[str, dict[str, Any]]:
    """For every arm the settings, flattened, in which the arms' first jobs differ."""
    first: dict[str, dict[str, Any]] = {}
    for one in jobs:
        if one.job.arm not in first:
            first[one.job.arm] = flatten({k: v for k, v in plain(one.config).items() if k not in BESIDE})
    keys = sorted({key for settings in first.values() for key in settings})
    differing = [key for key in keys if len({json.dumps(s.get(key), sort_keys=True) for s in first.values()}) > 1]
    found = {arm: {key: settings[key] for key in differing if key in settings} for arm, settings in first.items()}
    compare = jobs[0].config.compare
    for name, taken in (("final_of", compare.final_of), ("equal_macs", compare.equal_macs)):
        for arm in found.keys() & taken.keys():
            found[arm][f"compare.{name}"] = taken[arm]
    return found
