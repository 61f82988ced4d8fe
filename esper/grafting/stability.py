"""``stability``: half speed while training is unsteady; back to the last steady alpha when it stays so."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import StabilityConfig
from esper.grafting.grad_norm import outside_band, running_median
from esper.grafting.state import column

#: Weight of the past in the metric's running mean and variance.
_DECAY = 0.9
#: Measurements of the metric before its variance is judged.
_ENOUGH = 3
#: Losses below this are taken as this when their variance is judged: near zero any noise is large beside the mean.
_SMALL_LOSS = 0.1


def plan(config: StabilityConfig, state: Tensor, context: GraftingContext) -> Plan:
    """The only strategy under which alpha may fall: to where it stood at the last steady tick.

    Signals describe the alpha now in force, so that a steady tick marks the present position as steady.
    """
    unsteady, updates = find_unsteady(config, state, context)
    elapsed = column(state, "elapsed")
    stable = torch.where(unsteady, column(state, "stable"), elapsed)
    trouble = torch.where(unsteady, column(state, "trouble") + 1.0, torch.zeros_like(stable))
    back = trouble >= config.patience
    advance = torch.where(unsteady, torch.full_like(stable, 0.5), torch.ones_like(stable))
    advance = torch.where(back, stable - elapsed, advance)
    updates |= {"stable": stable, "trouble": torch.where(back, torch.zeros_like(trouble), trouble)}
    return Plan(advance, updates, config.max_hold)


def find_unsteady(config: StabilityConfig, state: Tensor, context: GraftingContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Where (bool ``[n]``) loss variance, gradient norm or metric variance is out of band, and the running figures."""
    loss = context.loss.abs().clamp(min=_SMALL_LOSS)
    loud = context.loss_variance > config.max_loss_variance * loss.square()
    median, updates = running_median(state, context)
    outside = outside_band(context.grad_norm, median, config.band_low, config.band_high)
    metric = _metric_figures(state, context)
    wavering = (metric["metric_count"] >= _ENOUGH) & (metric["metric_variance"] > config.max_metric_variance)
    return loud | outside | wavering, updates | metric


def _metric_figures(state: Tensor, context: GraftingContext) -> dict[str, Tensor]:
    """Exponentially weighted mean and variance (West 1979's incremental form); the first measurement sets the mean."""
    mean, variance, count = (column(state, f"metric_{what}") for what in ("mean", "variance", "count"))
    known = context.metric_known
    change = torch.where(count > 0.0, context.metric - mean, torch.zeros_like(mean))
    new_mean = torch.where(count > 0.0, mean + (1.0 - _DECAY) * change, context.metric)
    new_variance = _DECAY * (variance + (1.0 - _DECAY) * change.square())
    return {
        "metric_mean": torch.where(known, new_mean, mean),
        "metric_variance": torch.where(known, new_variance, variance),
        "metric_count": torch.where(known, (count + 1.0).clamp(max=float(_ENOUGH)), count),
    }


STABILITY = Strategy("stability", StabilityConfig, ("loss", "loss_variance", "grad_norm", "metric"), plan)
