"""``linear``: alpha = t / ramp. It reads no signal; only a high error rate aborts it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.grafting.base import GraftingConfig, GraftingContext, Plan, Strategy


@dataclass
class LinearConfig(GraftingConfig):
    """A straight ramp."""

    name: str = "linear"


def plan(config: LinearConfig, state: Tensor, context: GraftingContext) -> Plan:
    """One tick of ramp a tick."""
    return Plan(torch.ones_like(context.ramp), {}, max_hold=0.0)


LINEAR = Strategy("linear", LinearConfig, (), plan)
