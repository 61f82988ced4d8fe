"""``linear``: alpha = t / ramp. It reads no signal; only a high error rate aborts it."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import LinearConfig


def plan(config: LinearConfig, state: Tensor, context: GraftingContext) -> Plan:
    """One tick of ramp a tick."""
    return Plan(torch.ones_like(context.ramp), {}, max_hold=0.0)


LINEAR = Strategy("linear", LinearConfig, (), plan)
