"""Jobs that depend on other arms: the final net from scratch, runs of equal training MACs, and controls that are arms already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from esper.compare.config import CompareConfig
from esper.compare.sweep.sweep import PreparedJob, TuningJob
from esper.config import plain
from esper.controllers.scheduled import ScheduledConfig
from esper.errors import UserError
from esper.running.control_runs import DEPENDS_ON, SAME_MACS, SAME_STEPS, UNUSED, controls_of

#: The summary of the run of (arm, block, seed), empty where it did not finish.
FindSummary = Callable[[str, str, int], Mapping[str, Any]]


class MissingSource(Exception):
    """A job cannot run because a run that it depends on did not finish; the text says which."""


def sources(arm: str, compare: CompareConfig) -> list[str]:
    """The arms that must have run before this one."""
    found = [compare.final_of[arm]] if arm in compare.final_of else []
    return found + (list(_budget(arm, compare)) if arm in compare.equal_macs else [])


def _budget(arm: str, compare: CompareConfig) -> tuple[str, str]:
    budget, slash, price = compare.equal_macs[arm].partition("/")
    if not slash:
        given = compare.equal_macs[arm]
        raise UserError(f"compare.equal_macs.{arm}={given} is not accepted: write a/b, arm a's MACs at arm b's price a step.")
    return budget, price


def run_order(arms: Sequence[str], compare: CompareConfig) -> list[list[str]]:
    """The arms in the order in which they can run, those of one list side by side.

    Raises:
        UserError: an arm depends on one that the sweep has not, or on itself in a circle.
    """
    for arm in (*compare.final_of, *compare.equal_macs, *compare.fresh_seeds):
        for needed in (arm, *sources(arm, compare)):
            if needed not in arms:
                raise UserError(f"compare.final_of, equal_macs or fresh_seeds names the arm {needed!r}; the sweep has {', '.join(arms)}.")
    order: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(arms):
        ready = [arm for arm in arms if arm not in done and set(sources(arm, compare)) <= done]
        if not ready:
            left = ", ".join(arm for arm in arms if arm not in done)
            raise UserError(f"The arms {left} wait for each other (compare.final_of, compare.equal_macs); break the circle.")
        order.append(ready)
        done.update(ready)
    return order


def derive(one: PreparedJob, finished: FindSummary) -> PreparedJob:
    """The job with the settings that it takes over from other arms; unchanged where it depends on none.

    Raises:
        Missing: one of those runs did not finish.
    """
    compare, arm, config = one.config.compare, one.job.arm, one.config

    def of(source: str) -> Mapping[str, Any]:
        found = finished(source, one.job.block, one.job.seed)
        if not found:
            raise MissingSource(f"it depends on arm {source}, whose run with seed {one.job.seed} did not finish")
        return found

    if arm in compare.fresh_seeds:
        config = dataclasses.replace(config, seed=config.seed + compare.fresh_seeds[arm])
    if arm in compare.final_of:
        script = germinate_kept(of(compare.final_of[arm]))
        config = dataclasses.replace(config, controller=ScheduledConfig(script=script))
    if arm in compare.equal_macs:
        budget, price = (of(name) for name in _budget(arm, compare))
        steps = max(1, round(budget["macs"] * price["steps"] / price["macs"]))
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, steps=steps, epochs=0))
    return dataclasses.replace(one, config=config)


def germinate_kept(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A script that germinates at the start every branch that was blended in when the run ended."""
    kept = [branch for branch in summary["branches"] if branch.get("alpha", 0.0) > 0.0]
    return [
        {
            "at": "0%",
            "command": "germinate",
            "site": branch["site"],
            "seeds": [branch["seed"]],
            "blueprint": branch["blueprint"],
        }
        for branch in kept
    ]


def controls_to_train(one: PreparedJob, jobs: Sequence[PreparedJob]) -> list[str]:
    """The controls that this job trains.

    The report compares arms. It shows the host alone beside them where ``trainer.control=true`` asks for it; the default is for single
    runs. ``trainer.keep=better`` needs the control at the same steps, with its weights. The controls of a tuning job are never read.
    """
    trainer = one.config.trainer
    if isinstance(one.job, TuningJob):
        asked: list[str] = []
    else:
        arms = _arms(one, jobs) if trainer.control else []
        asked = [name for name in (SAME_STEPS, SAME_MACS) if trainer.control and name not in arms]
    needed = [SAME_STEPS] if trainer.keep == "better" and SAME_STEPS not in asked else []
    return [name for name in (*needed, *asked) if name in controls_of(one.config)]


def _arms(one: PreparedJob, jobs: Sequence[PreparedJob]) -> list[str]:
    """The controls of this job that are arms: a host alone that differs in nothing else, at as many steps or at as many MACs."""
    found, compare = [], one.config.compare
    place, settings = (one.job.block, one.job.seed), _settings(one)
    for other in jobs:
        arm = other.job.arm
        if controls_of(other.config) or (other.job.block, other.job.seed) != place or _settings(other) != settings:
            continue
        budget = compare.equal_macs.get(arm, "").partition("/")[0]
        if budget == one.job.arm:
            found.append(SAME_MACS)
        elif not budget and arm not in compare.fresh_seeds and one.job.arm not in (*compare.equal_macs, *compare.fresh_seeds):
            found.append(SAME_STEPS)
    return found


def _settings(one: PreparedJob) -> dict[str, Any]:
    """The settings that a control depends on."""
    tree = plain(one.config)
    trainer = {key: value for key, value in tree["trainer"].items() if key not in UNUSED}
    return {key: tree[key] for key in DEPENDS_ON} | {"trainer": trainer}
