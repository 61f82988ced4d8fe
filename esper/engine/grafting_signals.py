"""The signals that grafting strategies read: one ``GraftingContext`` for the branches that are blended in at a tick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.engine.measurements import Measured
from esper.engine.signals import LossSignal, branch_values
from esper.grafting import STRATEGY_NAMES, GraftingConfig, GraftingContext, signals_of
from esper.grafting.drift import weight_drift
from esper.seeds import Branch, SeedRegistry


class WeightAverages:
    """Exponential averages of the weights of branches whose strategy asks how far they drift."""

    def __init__(self) -> None:
        self.averages: dict[int, list[Tensor]] = {}

    def drift(self, registry: SeedRegistry, branches: list[Branch]) -> Tensor:
        """``‖w − w̄‖ / (‖w̄‖ + ε)`` of each branch, float32 ``[n]``; forgets branches that are not asked about."""
        asked = {branch.id for branch in branches}
        self.averages = {key: value for key, value in self.averages.items() if key in asked}
        values = []
        for branch in branches:
            weights = [value.unsqueeze(0) for value in branch_values(registry, branch)]
            averages = self.averages.get(branch.id, weights)
            drift, self.averages[branch.id] = weight_drift(weights, averages)
            values.append(drift)
        return torch.cat(values).cpu() if values else torch.zeros(0)

    def state(self) -> dict[str, Any]:
        """The averages, by branch, for a checkpoint."""
        return {str(branch): list(values) for branch, values in self.averages.items()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a saved state."""
        self.averages = {int(branch): [value.to(device) for value in values] for branch, values in state.items()}


@dataclass(frozen=True)
class _Columns:
    """Of ``n`` branches: ids, rows and places of their strategies in STRATEGY_NAMES, int64 ``[n]``; the ends of their ramps
    ``[n]``; and the signals that any of the strategies reads."""

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
        self._known: tuple[list[Branch], _Columns] = [], self._gathered([])

    def asks(self, branch: Branch, signal: str) -> bool:
        """Whether the strategy of a branch reads this signal."""
        return signal in signals_of(self.strategies[branch.strategy])

    def numbers(self, branches: list[Branch]) -> tuple[Tensor, Tensor]:
        """Of each branch its id and the place of its strategy in STRATEGY_NAMES, int64 ``[n]`` each."""
        columns = self._columns(branches)
        return columns.ids, columns.strategies

    def context(self, branches: list[Branch], measured: Measured) -> GraftingContext:
        """The signals of ``n`` branches at one tick, each a tensor ``[n]``. One that no strategy here reads is 0."""
        n, columns = len(branches), self._columns(branches)
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

    def _columns(self, branches: list[Branch]) -> _Columns:
        """What stays the same for as long as the same branches are blended by the same strategies."""
        if branches is not self._known[0]:
            self._known = branches, self._gathered(branches)
        return self._known[1]

    def _gathered(self, branches: list[Branch]) -> _Columns:
        configs = [self.strategies[branch.strategy] for branch in branches]
        return _Columns(
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
    """The branches' values ``[n]``, 0 where there is none."""
    return torch.tensor([values.get(branch.id, 0.0) for branch in branches])
