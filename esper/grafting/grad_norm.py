"""``grad_norm``: holds alpha while the branch's gradient norm is outside a band around its running median."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import GradNormConfig
from esper.grafting.state import WINDOW, column, columns

#: Norms that must be known before one is judged.
_ENOUGH = 3


def plan(config: GradNormConfig, state: Tensor, context: GraftingContext) -> Plan:
    """Holds at a norm outside the band; the window takes every norm, so a lasting new level becomes the median."""
    median, updates = running_median(state, context)
    outside = outside_band(context.grad_norm, median, config.band_low, config.band_high)
    return Plan(1.0 - outside.float(), updates, config.max_hold)


def running_median(state: Tensor, context: GraftingContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Median ``[n]`` of the last WINDOW norms before this tick's, and the window with it.

    Of an even number of norms the lower middle one; NaN while fewer than three are known. A norm of 0 at alpha 0 is no
    measurement, since a branch that is switched off has no gradient: it is not kept, and the median is NaN there.
    """
    window, count = columns(state, "grad_0", WINDOW), column(state, "grad_count")
    filled = torch.arange(WINDOW, device=state.device) < count.unsqueeze(1)
    ordered = torch.where(filled, window, torch.full_like(window, torch.inf)).sort(dim=1).values
    middle = ((count - 1.0).clamp(min=0.0) / 2.0).floor().long()
    median = ordered.gather(1, middle.unsqueeze(1)).squeeze(1)
    measured = (context.grad_norm > 0.0) | (column(state, "alpha") > 0.0)
    median = torch.where(measured & (count >= _ENOUGH), median, torch.full_like(median, torch.nan))
    shifted = torch.cat([context.grad_norm.unsqueeze(1), window[:, :-1]], dim=1)
    return median, {
        "grad_0": torch.where(measured.unsqueeze(1), shifted, window),
        "grad_count": torch.where(measured, (count + 1.0).clamp(max=float(WINDOW)), count),
    }


def outside_band(norm: Tensor, median: Tensor, low: float, high: float) -> Tensor:
    """Where (bool ``[n]``) ``norm`` is below ``low`` or above ``high`` medians; nowhere at a NaN median."""
    return (norm < low * median) | (norm > high * median)


GRAD_NORM = Strategy("grad_norm", GradNormConfig, ("grad_norm",), plan)
