"""Settings of a comparison, which the sweep's plan records before its first run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.setting_fields import setting


@dataclass
class CompareConfig:
    """The ``compare`` group: metric, margin, error rate and pairs of a sweep."""

    name: str = "default"
    metric: str = setting("", help="primary metric; empty means the task's own")
    direction: str = setting("auto", choices=("auto", "max", "min"), help="which way is better; auto asks the task")
    minimum_effect: float = setting(
        0.01, low=0.0, unit="of the metric", help="smallest difference worth having; also the margin of equivalence"
    )
    alpha: float = setting(0.05, low=1e-6, high=0.5, help="chance of one false 'better' in the whole sweep")
    power: float = setting(0.8, low=0.05, high=0.999, help="chance of finding a difference of minimum_effect")
    spread: float = setting(0.0, low=0.0, unit="of the metric", help="expected standard deviation of the paired differences; 0: unknown")
    pilot: str = setting("", help="comparison.json of an earlier sweep; its paired differences are the noise that power is stated for")
    reference: str = setting("", help="arm that the others are compared with; empty means the first")
    against: dict[str, str] = setting({}, help="arm: another one that it is compared with in place of the reference")
    block: list[str] = setting(["task", "model"], help="keys whose values are judged apart and then pooled")
    pooling: str = setting("both", choices=("both", "apart", "pooled"), help="verdicts on every block, over all of them, or both")
    sequential: bool = setting(False, help="look at the results on the way and stop once every comparison is decided")
    looks: int = setting(3, low=2, high=10, help="number of looks of a sequential sweep, the last included")
    ranking: bool = setting(False, help="also compare every arm with every other")
    figures: bool = setting(True, help="draw the figures")
    tune: dict[str, Any] = setting(
        {}, help="key: list of values that every arm may choose from on validation, with tune_trials also interval(a,b); a,b: one for both"
    )
    tune_trials: int = setting(0, low=0, high=10_000, help="trials by which Optuna tunes each arm; 0: every combination of the lists")
    tune_seeds: int = setting(3, low=1, help="seeds of their own that the tuning of each arm uses")
    final_of: dict[str, str] = setting({}, help="arm: arm with whose kept branches it starts, seed by seed")
    fresh_seeds: dict[str, int] = setting({}, low=0, help="arm: number added to its seeds, for an A/A test")
    equal_macs: dict[str, str] = setting({}, help="arm: a/b, it spends the MACs of arm a at the price a step has in arm b")
