"""``momentum``: the ramp gathers speed while the metric rises and loses it while the metric falls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.fields import setting
from esper.grafting.base import GraftingContext, HoldingConfig, Plan, Strategy
from esper.grafting.state import column


@dataclass
class MomentumConfig(HoldingConfig):
    """Speed ``1 + v`` with ``v <- momentum * v + gain * (rise of the metric)``."""

    name: str = "momentum"
    momentum: float = setting(0.9, low=0.0, high=0.999, help="share of the velocity kept at each measurement")
    gain: float = setting(20.0, low=0.0, help="velocity for a rise of the metric by 1")
    max_speed: float = setting(2.0, low=1.0, help="fastest ramp, in units of linear's")


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
