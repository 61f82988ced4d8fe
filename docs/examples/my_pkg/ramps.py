"""A grafting strategy of one's own: how many ticks of ramp to cover at each tick, for all grafting branches at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.grafting import GraftingContext, Plan
from esper.grafting.state import column


@dataclass
class Calm:
    """Climbs at half speed while the training loss is noisier than it was on average since grafting began."""

    patience: float = 1.5
    signals = ("loss_variance",)  # not finite: the branch is given up

    def plan(self, state: Tensor, context: GraftingContext) -> Plan:
        seen, mean = column(state, "own_0"), column(state, "own_1")  # a strategy's memory: own_0 … own_3, zero at first
        noisy = (seen > 0) & (context.loss_variance > self.patience * mean)
        updates = {"own_0": seen + 1, "own_1": mean + (context.loss_variance - mean) / (seen + 1)}
        return Plan(torch.where(noisy, 0.5, 1.0), updates, max_hold=1.0)
