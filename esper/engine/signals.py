"""Signals of the run: averages of the training loss, and the signals that grafting strategies read of the branches at a tick."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.engine.learning.branch_rows import branch_values
from esper.engine.measurements import Measured
from esper.grafting import STRATEGY_NAMES, GraftingConfig, GraftingContext, signals_of
from esper.grafting.drift import weight_drift
from esper.seeds import Branch, SeedRegistry


class LossSignal:
    """Fast (0.9) and slow (0.98) exponential averages of the training loss, and its variance around the fast one."""

    def __init__(self) -> None:
        self.fast = self.slow = float("nan")
        self.variance = 0.0
        self.heard = False
        self.diverging = False
        """Whether the last loss was no finite number: the host is not well, and nothing may grow on it."""

    def update(self, loss: float) -> None:
        """Take in one tick's loss; a non-finite one spoils the averages until finite ones replace it."""
        self.heard = True
        self.diverging = not math.isfinite(loss)
        if not math.isfinite(self.fast):
            self.fast, self.slow, self.variance = loss, loss, 0.0
            return
        deviation = loss - self.fast
        self.variance = 0.9 * (self.variance + 0.1 * deviation * deviation)
        self.fast = 0.9 * self.fast + 0.1 * loss
        self.slow = 0.98 * self.slow + 0.02 * loss

    def noise(self) -> float:
        """Standard deviation of the difference of two fast averages of a loss that stands still: ``√(2·v·0.1/1.9)``."""
        return math.sqrt(2.0 * self.variance * 0.1 / 1.9)

    def steadiness(self) -> float:
        """``1 − max(0, fast − slow) / |slow|``, at least 0: 1 for a loss that is constant or falls, NaN before the first loss.

        Only a rise counts against it: a host that is still learning has not been unsettled.
        """
        if not (math.isfinite(self.fast) and math.isfinite(self.slow)) or self.slow == 0.0:
            return float("nan")
        return max(0.0, 1.0 - max(0.0, self.fast - self.slow) / abs(self.slow))

    def state(self) -> dict[str, float]:
        """Everything, for a checkpoint."""
        return {"fast": self.fast, "slow": self.slow, "variance": self.variance, "diverging": float(self.diverging)}

    def load(self, state: dict[str, float]) -> None:
        """Take over a saved state."""
        self.fast, self.slow, self.variance = state["fast"], state["slow"], state["variance"]
        self.diverging = bool(state.get("diverging", 0.0))
        self.heard = math.isfinite(self.fast) or self.diverging


class WeightAverages:
    """Exponential averages of the weights of branches whose strategy asks how far they drift."""

    def __init__(self) -> None:
        self.averages: dict[int, list[Tensor]] = {}

    def drift(self, registry: SeedRegistry, branches: list[Branch]) -> Tensor:
        """``‖w − w̄‖ / (‖w̄‖ + ε)`` of each branch, float32 ``[n]``."""
        values = []
        for branch in branches:
            weights = [value.unsqueeze(0) for value in branch_values(registry, branch)]
            averages = self.averages.get(branch.id, weights)
            drift, self.averages[branch.id] = weight_drift(weights, averages)
            values.append(drift)
        return torch.cat(values).cpu() if values else torch.zeros(0)

    def keep(self, branches: Iterable[int]) -> None:
        """Forget all branches but these."""
        kept = set(branches)
        self.averages = {branch: averages for branch, averages in self.averages.items() if branch in kept}

    def state(self) -> dict[str, Any]:
        """The averages, by branch, for a checkpoint."""
        return {str(branch): list(values) for branch, values in self.averages.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a saved state."""
        self.averages = {int(branch): [value.to(device) for value in values] for branch, values in state.items()}


@dataclass(frozen=True)
class _StrategyColumns:
    """The values of ``n`` branches that change only with the branches or their strategies.

    ``ids``, ``rows`` and ``strategies`` (positions in STRATEGY_NAMES) are int64 ``[n]``, the ends of the ramps float32 ``[n]``. ``signals``
    are those that any of the strategies reads.
    """

    ids: Tensor
    rows: Tensor
    strategies: Tensor
    alpha_min: Tensor
    alpha_max: Tensor
    signals: frozenset[str]


class GraftingSignals:
    """Gathers the signals for the strategies of one registry; ``ramp`` is the length of a full ramp [ticks]."""

    def __init__(self, registry: SeedRegistry, strategies: Mapping[str, GraftingConfig], loss: LossSignal, ramp: int) -> None:
        self.registry = registry
        self.strategies = strategies
        self.loss = loss
        self.ramp = ramp
        self.weights = WeightAverages()
        self._columns: tuple[list[Branch], _StrategyColumns] = [], self._gather([])

    def asks(self, branch: Branch, signal: str) -> bool:
        """Whether the strategy of a branch reads this signal."""
        return signal in signals_of(self.strategies[branch.strategy])

    def ids_and_strategies(self, branches: list[Branch]) -> tuple[Tensor, Tensor]:
        """The branches' ids and the positions of their strategies in STRATEGY_NAMES, int64 ``[n]`` each."""
        columns = self._columns_of(branches)
        return columns.ids, columns.strategies

    def context(self, branches: list[Branch], measured: Measured) -> GraftingContext:
        """The signals of ``n`` branches at one tick, each a tensor ``[n]``; 0 where no strategy of theirs reads them."""
        n, columns = len(branches), self._columns_of(branches)
        nothing = torch.zeros(n)
        counterfactual = known = None
        if measured.counterfactual:
            found = [measured.counterfactual.get(branch.id) for branch in branches]
            counterfactual = torch.tensor([0.0 if value is None else value for value in found])
            known = torch.tensor([value is not None for value in found])
        return GraftingContext(
            ramp=torch.full((n,), float(max(1, self.ramp))),
            alpha_min=columns.alpha_min,
            alpha_max=columns.alpha_max,
            paused=self.registry.table.paused[columns.rows],
            metric=torch.full((n,), 0.0 if measured.metric is None else measured.metric),
            metric_known=torch.full((n,), measured.metric is not None),
            loss=torch.full((n,), self.loss.fast),
            loss_variance=torch.full((n,), self.loss.variance),
            grad_norm=_by_branch(measured.gradient_norms, branches) if "grad_norm" in columns.signals else nothing,
            drift=self._drift(branches) if "drift" in columns.signals else nothing,
            counterfactual=nothing if counterfactual is None else counterfactual,
            counterfactual_known=torch.zeros(n, dtype=torch.bool) if known is None else known,
            error_rate=_by_branch(measured.error_rates, branches) if measured.error_rates else nothing,
        )

    def _columns_of(self, branches: list[Branch]) -> _StrategyColumns:
        """The columns of these branches, gathered anew when the list of branches is another one."""
        if branches is not self._columns[0]:
            self._columns = branches, self._gather(branches)
        return self._columns[1]

    def _gather(self, branches: list[Branch]) -> _StrategyColumns:
        configs = [self.strategies[branch.strategy] for branch in branches]
        return _StrategyColumns(
            ids=torch.tensor([branch.id for branch in branches], dtype=torch.int64),
            rows=torch.tensor([branch.row for branch in branches], dtype=torch.int64),
            strategies=torch.tensor([STRATEGY_NAMES.index(branch.strategy) for branch in branches], dtype=torch.int64),
            alpha_min=torch.tensor([config.alpha_min for config in configs]),
            alpha_max=torch.tensor([config.alpha_max for config in configs]),
            signals=frozenset(signal for name in {branch.strategy for branch in branches} for signal in signals_of(self.strategies[name])),
        )

    def _drift(self, branches: list[Branch]) -> Tensor:
        asking = [branch for branch in branches if self.asks(branch, "drift")]
        drift = torch.zeros(len(branches))
        if asking:
            drift[[branches.index(branch) for branch in asking]] = self.weights.drift(self.registry, asking)
        return drift


def _by_branch(values: Mapping[int, float], branches: list[Branch]) -> Tensor:
    """The branches' values ``[n]``; 0 for a branch without one."""
    return torch.tensor([values.get(branch.id, 0.0) for branch in branches])
