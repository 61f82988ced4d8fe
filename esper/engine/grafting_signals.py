"""The signals that grafting strategies read: one ``GraftingContext`` for the branches that are blended in at a tick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esper.engine.measurements import Measured
from esper.engine.signals import LossSignal, branch_values
from esper.grafting import GraftingConfig, GraftingContext, signals_of
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


class GraftingSignals:
    """Gathers the signals for the strategies of one registry; ``ramp`` is the length of a full ramp [ticks]."""

    def __init__(self, registry: SeedRegistry, strategies: Mapping[str, GraftingConfig], loss: LossSignal, ramp: int) -> None:
        self.registry = registry
        self.strategies = strategies
        self.loss = loss
        self.ramp = ramp
        self.weights = WeightAverages()

    def asks(self, branch: Branch, signal: str) -> bool:
        """Whether the strategy of a branch reads this signal."""
        return signal in signals_of(self.strategies[branch.strategy])

    def context(self, branches: list[Branch], measured: Measured) -> GraftingContext:
        """The signals of ``n`` branches at one tick, each a tensor ``[n]``."""
        n = len(branches)
        configs = [self.strategies[branch.strategy] for branch in branches]
        rows = [branch.row for branch in branches]
        counterfactual = [measured.counterfactual.get(branch.id) for branch in branches]
        return GraftingContext(
            ramp=torch.full((n,), float(max(1, self.ramp))),
            alpha_min=torch.tensor([config.alpha_min for config in configs]),
            alpha_max=torch.tensor([config.alpha_max for config in configs]),
            paused=self.registry.table.paused[rows],
            metric=torch.full((n,), 0.0 if measured.metric is None else measured.metric),
            metric_known=torch.full((n,), measured.metric is not None),
            loss=torch.full((n,), self.loss.fast),
            loss_variance=torch.full((n,), self.loss.variance),
            grad_norm=torch.tensor([measured.gradient_norms.get(branch.id, 0.0) for branch in branches]),
            drift=self._drift(branches),
            counterfactual=torch.tensor([0.0 if value is None else value for value in counterfactual]),
            counterfactual_known=torch.tensor([value is not None for value in counterfactual]),
            error_rate=torch.tensor([measured.error_rates.get(branch.id, 0.0) for branch in branches]),
        )

    def _drift(self, branches: list[Branch]) -> Tensor:
        asking = [branch for branch in branches if self.asks(branch, "drift")]
        drift = torch.zeros(len(branches))
        if asking:
            drift[[branches.index(branch) for branch in asking]] = self.weights.drift(self.registry, asking)
        return drift
