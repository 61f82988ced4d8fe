"""``momentum``: the ramp gathers speed while the metric rises and loses it while the metric falls."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import MomentumConfig
from esper.grafting.state import column


def plan(config: MomentumConfig, state: Tensor, context: GraftingContext) -> Plan:
    """The velocity changes at ticks with a measurement and lasts between them; alpha never falls.

    ``v`` stays within ``[-1, max_speed - 1]``, so that a standstill ends with the first rises after it.
    """
    velocity, last = column(state, "velocity"), column(state, "metric_last")
    known = context.metric_known
    comparable = known & (column(state, "metric_seen") > 0.0)
    rise = torch.where(comparable, context.metric - last, torch.zeros_like(last))
    pushed = (config.momentum * velocity + config.gain * rise).clamp(-1.0, config.max_speed - 1.0)
    velocity = torch.where(comparable, pushed, velocity)
    updates = {
        "velocity": velocity,
        "metric_last": torch.where(known, context.metric, last),
        "metric_seen": torch.where(known, torch.ones_like(last), column(state, "metric_seen")),
    }
    return Plan(1.0 + velocity, updates, config.max_hold)


MOMENTUM = Strategy("momentum", MomentumConfig, ("metric",), plan)
