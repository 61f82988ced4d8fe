"""The same tuning budget for every arm: a grid, judged on validation, with seeds that the comparison never sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esper.compare.config import CompareConfig
from esper.compare.jobs import Prepared
from esper.config import RootConfig, build, plain
from esper.errors import UserError

FIRST_SEED = 1_000_000  # far from the seeds that people give

Values = dict[str, Any]


def grid(compare: CompareConfig) -> list[Values]:
    """Every combination of the values that ``compare.tune`` lists."""
    return [dict(zip(compare.tune, one, strict=True)) for one in itertools.product(*compare.tune.values())]


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


def trials(one: Prepared, seeds: int, folder: Path) -> list[tuple[Values, Prepared]]:
    """The tuning jobs of one arm in one block: every combination with every tuning seed."""
    found = []
    for number, values in enumerate(grid(one.config.compare)):
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            config = dataclasses.replace(with_values(one.config, values, one.choices), seed=seed)
            place = folder / f"tune-{one.folder.name}-{number}-{seed - FIRST_SEED}"
            found.append((values, Prepared(dataclasses.replace(one.job, seed=seed), config, one.choices, place)))
    return found


def best(tried: Sequence[tuple[Values, Prepared]], metric: str, sign: float) -> Values:
    """The combination with the best mean validation metric over its seeds; a failed run counts as the worst.

    Raises:
        UserError: no run of the arm gave the metric.
    """
    scores: dict[str, list[float]] = {}
    values_of: dict[str, Values] = {}
    for values, one in tried:
        final = (one.summary.get("metrics") or {}).get("final") or {}
        value = final.get(f"validation/{metric}")
        scores.setdefault(repr(values), []).append(-np.inf if value is None else sign * float(value))
        values_of[repr(values)] = values
    means = {key: float(np.mean(found)) for key, found in scores.items()}
    chosen = max(means, key=lambda key: means[key])
    if means[chosen] == -np.inf:
        raise UserError(f"Tuning arm {tried[0][1].job.arm!r}: no combination finished with a validation {metric}.")
    return values_of[chosen]
