"""The same tuning budget for every arm: a grid, judged on validation, with seeds that the comparison never sees."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esper.compare.config import CompareConfig
from esper.compare.results.comparison import TuningCandidate, TuningResult, Values, format_values
from esper.compare.sweep.sweep import PreparedJob, TuningJob, values_of
from esper.config import RootConfig, build, plain
from esper.errors import UserError
from esper.tracking.run_info import flatten

FIRST_SEED = 1_000_000  # far from the seeds that people give


LENGTH = {"trainer.steps", "trainer.epochs"}


def grid(compare: CompareConfig, arm: str) -> list[Values]:
    """Every combination of the values that ``compare.tune`` lists for ``arm``; keys with a comma between them share a value."""
    tuned = tuned_by(compare, arm)
    combinations = itertools.product(*tuned.values())
    return [{key: value for keys, value in zip(tuned, one, strict=True) for key in keys_of(keys)} for one in combinations]


def tuned_by(compare: CompareConfig, arm: str) -> dict[str, Any]:
    """What ``arm`` chooses of ``compare.tune``: an arm of ``compare.equal_macs`` has its length from other arms and chooses none."""
    return {key: given for key, given in compare.tune.items() if arm not in compare.equal_macs or not LENGTH & {*keys_of(key)}}


def keys_of(text: str) -> list[str]:
    return [key.strip() for key in text.split(",")]


def startup(trials: int) -> int:
    """How many trials of an arm are drawn by chance, the same for every arm and without waiting for others: a third, ten at most."""
    return min(10, -(-trials // 3))


def refuse_varied(jobs: Sequence[PreparedJob]) -> None:
    """Refuse to tune a key that makes the arms or the blocks: each would lose its own value.

    Raises:
        UserError: naming the key and its value in every arm.
    """
    settings = {" ".join(filter(None, place)): flatten(plain(one.config)) for place, one in first_jobs(jobs).items()}
    for key in itertools.chain.from_iterable(map(keys_of, jobs[0].config.compare.tune)):
        found = {name: one.get(key) for name, one in settings.items()}
        if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
            told = ", ".join(f"{name} has {'none' if value is None else value}" for name, value in found.items())
            raise UserError(
                f"compare.tune.{key} is not accepted, because the arms differ in {key} ({told}) and tuning would put its own value "
                f"into each: tune another key, or do not sweep over this one."
            )


def first_jobs(jobs: Sequence[PreparedJob]) -> dict[tuple[str, str], PreparedJob]:
    """The first job of every arm in every block."""
    found: dict[tuple[str, str], PreparedJob] = {}
    for one in jobs:
        found.setdefault((one.job.arm, one.job.block), one)
    return found


def with_values(config: RootConfig, values: Mapping[str, Any], choices: Mapping[str, str]) -> RootConfig:
    """The config with some dotted keys set, checked like one from the command line.

    Raises:
        UserError: a key that does not exist or a value that is not accepted.
    """
    tree = {key: value for key, value in plain(config).items() if value is not None}
    presets = {preset: tree.pop(preset, "") for preset in ("experiment", "arm", "debug")}
    for key, value in values.items():
        node = tree
        *path, last = key.split(".")
        for part in path:
            if not isinstance(node.get(part), dict):
                raise UserError(f"compare.tune names {key}, which is no setting of this sweep.")
            node = node[part]
        node[last] = value
    return build(tree, presets)


def tuning_jobs(jobs: Sequence[PreparedJob], seeds: int, folder: Path) -> list[PreparedJob]:
    """The tuning jobs: for every arm in every block each combination, or each trial, with each tuning seed; none where nothing is tuned.

    Raises:
        UserError: a key or a value that is not accepted.
    """
    if not jobs[0].config.compare.tune:
        return []
    refuse_varied(jobs)
    if jobs[0].config.compare.tune_trials:
        return _trial_jobs(jobs, folder)
    found: list[PreparedJob] = []
    for one in first_jobs(jobs).values():
        for number, values in enumerate(grid(one.config.compare, one.job.arm)):
            for seed in range(FIRST_SEED, FIRST_SEED + seeds):
                config = dataclasses.replace(with_values(one.config, values, one.choices), seed=seed)
                job = TuningJob(len(jobs) + len(found), one.job.overrides, one.job.arm, one.job.block, seed, values)
                place = folder / f"tune-{one.folder.name}-{number}-{seed - FIRST_SEED}"
                found.append(PreparedJob(job, config, one.choices, place))
    return found


def _trial_jobs(jobs: Sequence[PreparedJob], folder: Path) -> list[PreparedJob]:
    """The tuning jobs of every arm in every block, by trial and seed; their values are not known yet."""
    compare, found = jobs[0].config.compare, list[PreparedJob]()
    for one in first_jobs(jobs).values():
        for trial in range(compare.tune_trials):
            for at in range(compare.tune_seeds):
                seed = FIRST_SEED + at
                job = TuningJob(len(jobs) + len(found), one.job.overrides, one.job.arm, one.job.block, seed, {}, trial)
                place = folder / f"tune-{one.folder.name}-{trial}-{at}"
                found.append(PreparedJob(job, dataclasses.replace(one.config, seed=seed), one.choices, place))
    return found


def choose(tried: Sequence[PreparedJob], metric: str, sign: float) -> TuningResult:
    """The combination with the best mean validation metric over its seeds, of those in which no run failed.

    Args:
        tried: the tuning jobs of one arm in one block, all ended.

    Raises:
        UserError: there is none.
    """
    job = tried[0].job
    groups: dict[str, list[PreparedJob]] = {}
    for one in tried:
        groups.setdefault(format_values(values_of(one)), []).append(one)
    rows = tuple(_row(group, metric) for group in groups.values())
    sound = [row for row in rows if not row.failed]
    if not sound:
        raise UserError(
            f"Tuning arm {job.arm!r}: every combination has a run that failed or gave no validation {metric}, so none can be "
            "chosen; the log of each run says why."
        )
    macs = sum(float(one.summary.get("macs") or 0.0) for one in tried)
    return TuningResult(job.arm, job.block, max(sound, key=lambda row: sign * row.mean).values, rows, macs)


def _row(group: Sequence[PreparedJob], metric: str) -> TuningCandidate:
    failed = sum(math.isnan(_validated(one, metric)) for one in group)
    return TuningCandidate(values_of(group[0]), mean_of(group, metric), len(group), failed)


def mean_of(group: Sequence[PreparedJob], metric: str) -> float:
    """The mean validation metric of tuning jobs, NaN where one failed."""
    return float(np.mean([_validated(one, metric) for one in group]))


def _validated(one: PreparedJob, metric: str) -> float:
    """The final validation metric of a tuning job, NaN where it failed."""
    summary = one.summary
    value = ((summary.get("metrics") or {}).get("final") or {}).get(f"validation/{metric}")
    if one.error or summary.get("status") != "FINISHED" or value is None or not math.isfinite(value):
        return math.nan
    return float(value)
