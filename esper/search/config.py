"""Settings of a search; those of the sweeper are the keys of ``hydra.sweeper``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.errors import UserError
from esper.setting_fields import setting

SAMPLERS = ("tpe", "nsga2", "random")
PRUNERS = ("median", "halving", "none")
COSTS = ("parameters", "macs")
QUALITY = "quality"


@dataclass
class SearchConfig:
    """``hydra/sweeper=optuna``: settings are chosen by Optuna, trial by trial."""

    n_trials: int = setting(20, low=1, high=1_000_000, help="trials in all; pruned and failed ones count too")
    sampler: str = setting("tpe", choices=SAMPLERS, help="who proposes: Optuna's TPE, its NSGA-II, or chance")
    seed: int = setting(0, low=0, high=2**32 - 1, help="random seed of the sampler")
    startup: int = setting(10, low=1, help="trials drawn by chance before the sampler has enough to learn from")
    objectives: list[str] = setting(
        [QUALITY], help="what counts: quality (a validation metric), parameters, macs; several make a front, and nothing is pruned"
    )
    metric: str = setting("", help="validation metric of quality; empty: compare.metric, else the task's primary metric")
    pruner: str = setting("median", choices=PRUNERS, help="end trials early that fall behind on validation")
    prune_after: float = setting(25.0, low=0.0, high=100.0, unit="% of the run", help="no trial is ended before")
    prune_trials: int = setting(5, low=1, help="trials that must have finished before another is ended early")
    params: dict[str, Any] | None = setting(None, help="search space of a file: key: choice(…), interval(…), range(…)")

    def __post_init__(self) -> None:
        """Refuse objectives that there are not, or that are given twice."""
        known = (QUALITY, *COSTS)
        if wrong := [one for one in self.objectives if one not in known]:
            raise UserError(f"hydra.sweeper.objectives has {wrong[0]}; there are {', '.join(known[:-1])} and {known[-1]}.")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UserError("hydra.sweeper.objectives needs one objective or more, each once, as in [quality,parameters].")
