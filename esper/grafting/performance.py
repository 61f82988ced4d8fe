"""``performance``: the ramp is as fast as the branch is useful, by the training loss with it off against on."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import PerformanceConfig
from esper.grafting.state import column

_EPS = 1e-8


def plan(config: PerformanceConfig, state: Tensor, context: GraftingContext) -> Plan:
    """A branch that lowers the loss speeds up, one that raises it slows down to a standstill; alpha never falls.

    The speed of the last measurement lasts until the next; it is linear's before the first.
    """
    fall = context.counterfactual / (context.loss.abs() + _EPS)
    measured = (config.sensitivity * fall).clamp(-1.0, config.max_speed - 1.0)
    speed = torch.where(context.counterfactual_known, measured, column(state, "gain_speed"))
    return Plan(1.0 + speed, {"gain_speed": speed}, config.max_hold)


PERFORMANCE = Strategy("performance", PerformanceConfig, ("counterfactual", "loss"), plan)
