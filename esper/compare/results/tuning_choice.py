"""What tuning chose for every arm, and what the choice cost: part of a comparison, kept with it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """One combination of values: its mean validation metric over the tuning seeds, NaN where one of its runs failed."""

    values: Values
    mean: float
    runs: int
    failed: int

    @property
    def named(self) -> str:
        """The values as a person would type them."""
        return named(self.values)


@dataclass(frozen=True)
class Tuned:
    """What one arm chose in one block; ``macs`` is what all of its tuning runs spent, failed ones as far as they came."""

    arm: str
    block: str
    values: Values
    tried: tuple[Tried, ...]
    macs: float

    @property
    def where(self) -> str:
        """Arm and block as one name."""
        return " ".join(part for part in (self.arm, self.block) if part)

    @property
    def runs(self) -> int:
        """How many runs it took."""
        return sum(one.runs for one in self.tried)

    @property
    def failed(self) -> int:
        """How many of them gave no validation metric."""
        return sum(one.failed for one in self.tried)

    @property
    def mean(self) -> float:
        """The mean validation metric of the values chosen."""
        return next(one.mean for one in self.tried if one.values == self.values)

    def sentence(self, metric: str) -> str:
        """What was chosen, for the person who watches the sweep."""
        cost = f"{self.runs} runs, {self.failed} failed, {self.macs:.3g} MACs"
        return f"tuned {self.where}: {named(self.values)}, validation {metric} {self.mean:.4g} ({cost})"

    def warning(self) -> list[str]:
        """A note where tuning runs failed; empty where none did."""
        if not self.failed:
            return []
        told = ", ".join(f"{one.named} {one.failed} of {one.runs}" for one in self.tried if one.failed)
        return [f"{self.failed} of {self.runs} tuning runs of {self.where} failed ({told}); values with a failed run are not chosen."]

    def numbers(self) -> dict[str, float]:
        """What the sweep's parent run gets as metrics."""
        found = {"runs": float(self.runs), "failed": float(self.failed), "macs": self.macs, "validation": self.mean}
        return {f"tuning/{self.where}/{name}": value for name, value in found.items()}


def named(values: Mapping[str, Any]) -> str:
    """``optimizer.lr=0.003 grafting.ramp=5%``."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def text(tuned: Iterable[Tuned]) -> str:
    """The records as JSON, ``null`` for a mean that there is not."""
    rows = [dataclasses.asdict(one) for one in tuned]
    for row in rows:
        for tried in row["tried"]:
            tried["mean"] = tried["mean"] if math.isfinite(tried["mean"]) else None
    return json.dumps(rows, allow_nan=False)


def parse(written: str) -> list[Tuned]:
    """The inverse of :func:`text`."""
    return [
        Tuned(**{**row, "tried": tuple(Tried(**{**one, "mean": math.nan if one["mean"] is None else one["mean"]}) for one in row["tried"])})
        for row in json.loads(written)
    ]
