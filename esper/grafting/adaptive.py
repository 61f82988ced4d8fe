"""``adaptive``: picks among the other strategies by the present signals, and keeps score of which choice paid."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.grafting.base import GraftingContext, Plan, Strategy
from esper.grafting.config import AdaptiveConfig, DriftConfig, GradNormConfig
from esper.grafting.drift import DRIFT
from esper.grafting.grad_norm import GRAD_NORM, running_median
from esper.grafting.linear import LINEAR
from esper.grafting.momentum import MOMENTUM
from esper.grafting.performance import PERFORMANCE
from esper.grafting.stability import STABILITY
from esper.grafting.state import CHOICES, column, columns

_OTHERS = {s.name: s for s in (LINEAR, DRIFT, MOMENTUM, STABILITY, GRAD_NORM, PERFORMANCE)}
_EPS = 1e-8


def plan(config: AdaptiveConfig, state: Tensor, context: GraftingContext) -> Plan:
    """All the others plan, so that their running figures stay warm; the plan of the one chosen counts."""
    plans = {name: _OTHERS[name].plan(_OTHERS[name].config(), state, context) for name in CHOICES}
    updates: dict[str, Tensor] = {}
    for other in plans.values():
        updates |= other.updates
    advances = torch.stack([plans[name].advance for name in CHOICES], dim=1)
    scores, scored = keep_score(config, state, context)
    fits = torch.stack(_fit(state, context, plans), dim=1)
    choice, chosen = choose(config, state, fits + config.score_weight * scores)
    changed = choice != column(state, "choice").long()
    # The gain known so far is the earlier choice's work: the new one is paid from its own first measurement on.
    scored["gain_seen"] = torch.where(changed, torch.zeros_like(scored["gain_seen"]), scored["gain_seen"])
    advance = advances.gather(1, choice.unsqueeze(1)).squeeze(1)
    return Plan(advance, updates | scored | chosen, config.max_hold)


def _fit(state: Tensor, context: GraftingContext, plans: dict[str, Plan]) -> list[Tensor]:
    """How well each of CHOICES suits the signals, ``[n]`` each, in 0..1; ``linear`` is 1/2, and so is a signal at its threshold.

    A strategy that holds suits the more, the further its signal is beyond the threshold (1/2 there, 1 at twice the
    threshold); a strategy that speeds up suits in proportion to its speed.
    """
    half = torch.full_like(context.ramp, 0.5)
    median, _ = running_median(state, context)
    norm = torch.where(median.isnan(), median.new_ones(()), context.grad_norm / (median + _EPS)).clamp(min=_EPS)
    excess = torch.maximum(norm / GradNormConfig().band_high, GradNormConfig().band_low / norm)
    fits = {
        "linear": half,
        "drift": (0.5 * context.drift / DriftConfig().threshold).clamp(0.0, 1.0),
        "momentum": (0.5 * plans["momentum"].advance).clamp(0.0, 1.0),
        "stability": 0.75 * (plans["stability"].advance < 1.0).float(),
        "grad_norm": (0.5 * excess).clamp(0.0, 1.0),
        "performance": (0.5 * plans["performance"].advance).clamp(0.0, 1.0),
    }
    return [fits[name] for name in CHOICES]


def keep_score(config: AdaptiveConfig, state: Tensor, context: GraftingContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores ``[n, choices]`` in -1..1 and the columns that hold them.

    The choice in force earns the rise of the counterfactual gain, as a share of the loss, since the measurement before.
    Only counterfactual gains count: a loss that falls by itself earns nothing.
    """
    paid, choice = columns(state, f"paid_{CHOICES[0]}", len(CHOICES)), column(state, "choice")
    gain = context.counterfactual / (context.loss.abs() + _EPS)
    known, last = context.counterfactual_known, column(state, "gain_last")
    gain = torch.where(known, gain, last).clamp(-1.0, 1.0)
    pay = (config.score_scale * (gain - last)).clamp(-1.0, 1.0).unsqueeze(1)
    due = (known & (column(state, "gain_seen") > 0.0)).unsqueeze(1)
    mine = torch.arange(len(CHOICES), device=state.device) == choice.unsqueeze(1)
    scores = torch.where(due & mine, config.score_decay * paid + (1.0 - config.score_decay) * pay, paid)
    seen = torch.where(known, torch.ones_like(last), column(state, "gain_seen"))
    return scores, {f"paid_{CHOICES[0]}": scores, "gain_last": gain, "gain_seen": seen}


def choose(config: AdaptiveConfig, state: Tensor, strength: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Choice ``[n]`` (int64, positions in CHOICES) with hysteresis, from ``strength`` ``[n, choices]``.

    The strongest takes over after being stronger by ``margin`` for ``patience`` ticks in a row; among equals the first.
    """
    choice = column(state, "choice").long()
    best, rival = strength.max(dim=1)
    stronger = best > strength.gather(1, choice.unsqueeze(1)).squeeze(1) + config.margin
    same = rival == column(state, "rival").long()
    ticks = torch.where(same, column(state, "rival_ticks"), torch.zeros_like(best)) + 1.0
    ticks = torch.where(stronger, ticks, torch.zeros_like(best))
    takes_over = ticks >= config.patience
    choice = torch.where(takes_over, rival, choice)
    ticks = torch.where(takes_over, torch.zeros_like(ticks), ticks)
    return choice, {"choice": choice.float(), "rival": rival.float(), "rival_ticks": ticks}


ADAPTIVE = Strategy(
    "adaptive",
    AdaptiveConfig,
    ("drift", "metric", "loss", "loss_variance", "grad_norm", "counterfactual"),
    plan,
)
