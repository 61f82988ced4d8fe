"""``drift``: holds alpha for a while whenever the branch's weights move too fast to be blended in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import DriftConfig
from esper.grafting.state import column

_EPS = 1e-8


def plan(config: DriftConfig, state: Tensor, context: GraftingContext) -> Plan:
    """A tick above the threshold starts a hold of ``pause`` ramps, itself included; after it, drift is asked again."""
    left = column(state, "drift_hold")
    starts = (left <= 0.0) & (context.drift > config.threshold)
    left = torch.where(starts, (config.pause * context.ramp).ceil().clamp(min=1.0), left)
    holds = left > 0.0
    return Plan(1.0 - holds.float(), {"drift_hold": (left - 1.0).clamp(min=0.0)}, config.max_hold)


def weight_drift(weights: Sequence[Tensor], averages: Sequence[Tensor], decay: float = 0.9) -> tuple[Tensor, list[Tensor]]:
    """The signal this strategy reads: ``||w - a|| / (||a|| + eps)`` over a branch's parameters, ``a`` an EMA of ``w``.

    Args:
        weights: parameters of ``n`` branches, each tensor ``[n, ...]``.
        averages: their averages up to the tick before; at the first tick, copies of the weights.
        decay: share of the average that is kept at each tick.

    Returns:
        drift ``[n]``, float32, and the averages with this tick's weights in them.
    """
    distance = _squared_norm([w - a for w, a in zip(weights, averages, strict=True)]).sqrt()
    size = _squared_norm(averages).sqrt()
    return distance / (size + _EPS), [decay * a + (1.0 - decay) * w for w, a in zip(weights, averages, strict=True)]


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.float().flatten(1).square().sum(1) for t in tensors]).sum(0)


DRIFT = Strategy("drift", DriftConfig, ("drift",), plan)
