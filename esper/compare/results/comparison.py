"""The comparison of a sweep as data: the tuning, the arms and the judgements; ``comparison.json`` holds it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esper.compare.results.plan import Plan
from esper.compare.results.runs import Seed
from esper.compare.statistics.power import PairsNeeded

Values = dict[str, Any]
SCHEMA = 2


@dataclass(frozen=True)
class TuningCandidate:
    """One combination of values: its mean validation metric over the tuning seeds, NaN where one of its runs failed."""

    values: Values
    mean: float
    runs: int
    failed: int

    @property
    def named(self) -> str:
        """The values as a person would type them."""
        return format_values(self.values)


@dataclass(frozen=True)
class TuningResult:
    """The values that one arm chose in one block; ``macs`` are those of all its tuning runs, failed ones as far as they came."""

    arm: str
    block: str
    values: Values
    tried: tuple[TuningCandidate, ...]
    macs: float

    @property
    def where(self) -> str:
        """Arm and block as one name."""
        return " ".join(part for part in (self.arm, self.block) if part)

    @property
    def runs(self) -> int:
        """How many tuning runs there were."""
        return sum(one.runs for one in self.tried)

    @property
    def failed(self) -> int:
        """How many tuning runs gave no validation metric."""
        return sum(one.failed for one in self.tried)

    @property
    def mean(self) -> float:
        """The mean validation metric of the values chosen."""
        return next(one.mean for one in self.tried if one.values == self.values)

    def sentence(self, metric: str) -> str:
        """The choice in a sentence, for the terminal."""
        cost = f"{self.runs} runs, {self.failed} failed, {self.macs:.3g} MACs"
        return f"tuned {self.where}: {format_values(self.values)}, validation {metric} {self.mean:.4g} ({cost})"

    def warning(self) -> list[str]:
        """A note where tuning runs failed; empty where none did."""
        if not self.failed:
            return []
        told = ", ".join(f"{one.named} {one.failed} of {one.runs}" for one in self.tried if one.failed)
        return [f"{self.failed} of {self.runs} tuning runs of {self.where} failed ({told}); values with a failed run are not chosen."]

    def numbers(self) -> dict[str, float]:
        """The metrics that the sweep's parent run gets."""
        found = {"runs": float(self.runs), "failed": float(self.failed), "macs": self.macs, "validation": self.mean}
        return {f"tuning/{self.where}/{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class ArmResult:
    """One arm in one block: quality, failures, cost, growth and controls over its runs (means over the finished ones).

    ``points`` has the metric of every finished run by its seed, ``cost_points`` each of its costs.
    """

    arm: str
    block: str
    runs: int
    failed: int
    mean: float
    iqm: float
    spread: float
    costs: dict[str, float]
    growth: dict[str, float]
    alone: dict[str, float]
    points: dict[Seed, float]
    cost_points: dict[str, dict[Seed, float]]


@dataclass(frozen=True)
class Judgement:
    """One comparison. Differences are positive where ``arm`` (B) is better than ``reference`` (A).

    ``interval`` is that of the test for a difference and has the confidence ``level`` that Holm's correction leaves it: it excludes 0
    exactly where the difference is sure. ``equivalence_interval`` lies within the margin exactly where the arms are equivalent; it is
    NaN where a run that failed keeps them from it. ``resolution`` is the smallest change of the metric that the test set can show,
    NaN where the metric does not count samples; ``needs`` is None where the verdict lacks nothing. ``pairs`` is 0 where the arms were
    judged unpaired: ``counts`` then has the runs of either, and ``points`` the differences of the arm's runs to the reference's mean.
    """

    arm: str
    reference: str
    block: str
    verdict: str
    sentence: str
    difference: float
    difference_finished: float
    p: float
    p_holm: float
    p_equivalent: float
    interval: tuple[float, float]
    level: float
    equivalence_interval: tuple[float, float]
    equivalence_level: float
    probability: float
    pairs: int
    counts: tuple[int, int]
    failed: tuple[int, int]
    costs: dict[str, float]
    resolution: float
    needs: PairsNeeded | None
    seeds: tuple[Seed, ...]
    points: tuple[float, ...]
    finished: tuple[bool, ...]


@dataclass(frozen=True)
class Overall:
    """One arm over all blocks: the interquartile mean of all its runs and the performance profile, with intervals of a bootstrap.

    ``profile`` has for every threshold the share of runs that are better, and its interval: (threshold, share, low, high).
    """

    arm: str
    runs: int
    iqm: float
    interval: tuple[float, float]
    profile: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Comparison:
    """The content of ``comparison.json`` besides the plan."""

    arms: list[ArmResult]
    verdicts: list[Judgement]
    exploratory: list[str]
    notes: list[str]
    ranking: list[Judgement] = field(default_factory=list)
    conclusion: list[str] = field(default_factory=list)
    tuned: list[TuningResult] = field(default_factory=list)
    overall: list[Overall] = field(default_factory=list)


def with_tuned(comparison: Comparison, tuned: Sequence[TuningResult]) -> Comparison:
    """The comparison with the results of the tuning, and a note on every tuning run that failed."""
    return replace(comparison, tuned=list(tuned), notes=[*comparison.notes, *(line for one in tuned for line in one.warning())])


def as_dict(comparison: Comparison, plan: Plan) -> dict[str, Any]:
    """The comparison and its plan, with ``null`` for NaN and infinity, which JSON does not have."""
    tree = {"schema": SCHEMA, "plan": dataclasses.asdict(plan), **dataclasses.asdict(comparison)}
    return {key: _plain(value) for key, value in tree.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(comparison: Comparison, plan: Plan, path: Path) -> Path:
    """``comparison.json``, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(as_dict(comparison, plan), indent=2, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def format_values(values: Mapping[str, Any]) -> str:
    """``optimizer.lr=0.003 grafting.ramp=5%``."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def tuning_text(tuned: Iterable[TuningResult]) -> str:
    """The results as JSON, with ``null`` for a mean that does not exist."""
    rows = [dataclasses.asdict(one) for one in tuned]
    for row in rows:
        for tried in row["tried"]:
            tried["mean"] = tried["mean"] if math.isfinite(tried["mean"]) else None
    return json.dumps(rows, allow_nan=False)


def parse_tuning(written: str) -> list[TuningResult]:
    """The inverse of :func:`tuning_text`."""
    rows = json.loads(written)
    for row in rows:
        for tried in row["tried"]:
            tried["mean"] = math.nan if tried["mean"] is None else tried["mean"]
        row["tried"] = tuple(TuningCandidate(**tried) for tried in row["tried"])
    return [TuningResult(**row) for row in rows]
