"""The ramp that all grafting strategies share: their signals, their limits in a tick, and the end of a failing one.

A strategy only proposes how many ticks of ramp to cover (``Plan.advance``; 1 is the speed of ``linear``).
This module turns the proposal into alpha, under the rules common to all: a paused branch keeps its whole state; a branch in
trouble aborts, as does one whose proposal is not finite; and holding, slowing or stepping back never gives up more than
``max_hold`` ramps, so that after ``k`` ticks ``elapsed >= k - max_hold * ramp`` and GRAFTING cannot hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from esper.grafting.config import GraftingConfig, HoldingConfig
from esper.grafting.state import STATE_WIDTH, column, initial_state, with_columns

#: A share of failed ticks above this aborts, under every strategy.
MAX_ERROR_RATE = 0.5
#: Signals beyond this count as non-finite: their squares would overflow float32.
LARGEST_SIGNAL = 1e18


@dataclass(frozen=True)
class GraftingContext:
    """The signals of ``n`` branches at a tick; every field is a tensor ``[n]``, float32 unless said otherwise.

    ``metric`` and ``counterfactual`` count only where their mask says that they were measured at this tick; elsewhere
    their value is never looked at. The other signals are always known. The signals belong to the alpha now in force.
    """

    ramp: Tensor  # ticks, >= 1
    alpha_min: Tensor
    alpha_max: Tensor
    paused: Tensor  # bool
    metric: Tensor  # higher is better
    metric_known: Tensor  # bool
    loss: Tensor  # training loss, an EMA
    loss_variance: Tensor  # of the training loss around that EMA
    grad_norm: Tensor  # of the branch's parameters
    drift: Tensor  # ||w - average|| / (||average|| + eps), see drift.weight_drift
    counterfactual: Tensor  # training loss with the branch off minus with it on
    counterfactual_known: Tensor  # bool
    error_rate: Tensor  # share of recent ticks at which the branch failed, 0..1

    @classmethod
    def quiet(
        cls,
        n: int,
        ramp: float,
        alpha_min: float = 0.0,
        alpha_max: float = 1.0,
        device: torch.device | str | None = None,
    ) -> GraftingContext:
        """A context in which nothing is measured and nothing is wrong; use ``dataclasses.replace`` to say more."""
        full = {"ramp": float(ramp), "alpha_min": alpha_min, "alpha_max": alpha_max}
        flags = ("paused", "metric_known", "counterfactual_known")
        return cls(
            **{
                field.name: torch.full((n,), False, dtype=torch.bool, device=device)
                if field.name in flags
                else torch.full((n,), full.get(field.name, 0.0), dtype=torch.float32, device=device)
                for field in fields(cls)
            }
        )

    def select(self, rows: Tensor) -> GraftingContext:
        """The context of some of the branches; ``rows`` is bool ``[n]`` or indices."""
        return GraftingContext(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class GraftingOutput:
    """Result of a tick; tensors ``[n]``.

    ``alpha`` is that of the next forward. ``abort`` branches keep the alpha and state they had and are to be culled;
    ``done`` branches have reached ``alpha_max``, where they stay.
    """

    alpha: Tensor
    state: Tensor  # [n, STATE_WIDTH]
    abort: Tensor  # bool
    done: Tensor  # bool


@dataclass(frozen=True)
class Plan:
    """A strategy's proposal for a tick.

    ``advance`` ``[n]`` is the ticks of ramp to cover now (1 as ``linear``, 0 to hold, negative to step back),
    ``updates`` are new values of its own columns, ``max_hold`` is how many ramps it may give up in all.
    """

    advance: Tensor
    updates: dict[str, Tensor]
    max_hold: float


@dataclass(frozen=True)
class Strategy:
    """A named rule: its config class, the context's signals it reads, and ``plan(config, state, context) -> Plan``."""

    name: str
    config: type[GraftingConfig]
    signals: tuple[str, ...]
    plan: Callable[..., Plan]

    def step(self, config: GraftingConfig, state: Tensor, context: GraftingContext) -> GraftingOutput:
        """One tick of ``n`` branches, all under this strategy; ``state`` ``[n, STATE_WIDTH]`` is not written to."""
        assert state.shape[1] == STATE_WIDTH, f"state has {state.shape[1]} columns, expected {STATE_WIDTH}"
        wish = self.plan(config, state, context)
        abort = find_trouble(self.signals, context) | ~torch.isfinite(wish.advance)
        moved = advance_ramp(state, wish, context)
        kept = torch.where((abort | context.paused).unsqueeze(1), state, moved)
        fresh = column(state, "alpha").clamp(min=context.alpha_min, max=context.alpha_max)
        alpha = torch.where(abort | context.paused, fresh, column(kept, "alpha"))
        done = (column(kept, "elapsed") >= context.ramp) & ~abort
        return GraftingOutput(alpha, kept, abort, done)


def find_trouble(signals: tuple[str, ...], context: GraftingContext) -> Tensor:
    """Where (bool ``[n]``) a known one of ``signals`` is not finite or the error rate is not at most MAX_ERROR_RATE."""
    abort = ~(context.error_rate <= MAX_ERROR_RATE)
    for name in signals:
        bad = ~(getattr(context, name).abs() <= LARGEST_SIGNAL)
        known = getattr(context, f"{name}_known", None)
        abort = abort | (bad if known is None else bad & known)
    return abort


def advance_ramp(state: Tensor, plan: Plan, context: GraftingContext) -> Tensor:
    """The state after ``plan``, whose proposal is limited by the remaining hold budget and the end of the ramp."""
    elapsed, held = column(state, "elapsed"), column(state, "held")
    budget = (plan.max_hold * context.ramp - held).clamp(min=0.0)
    advance = torch.maximum(plan.advance, 1.0 - budget)
    reached = elapsed >= context.ramp
    held = torch.where(reached, held, held + (1.0 - advance).clamp(min=0.0))
    elapsed = torch.where(reached, elapsed, (elapsed + advance).clamp(min=0.0))
    elapsed = torch.minimum(elapsed, context.ramp)
    updates = plan.updates | {"elapsed": elapsed, "held": held, "alpha": alpha_at(elapsed, context)}
    return with_columns(state, updates)


def alpha_at(elapsed: Tensor, context: GraftingContext) -> Tensor:
    """alpha ``[n]`` after ``elapsed`` ticks of ramp; exactly ``alpha_max`` at its end."""
    climbed = context.alpha_min + (context.alpha_max - context.alpha_min) * (elapsed / context.ramp)
    alpha = torch.where(elapsed >= context.ramp, context.alpha_max, climbed)
    return torch.minimum(torch.maximum(alpha, context.alpha_min), context.alpha_max)


def hand_over(state: Tensor, rows: Tensor, context: GraftingContext) -> Tensor:
    """The state with ``rows`` (bool ``[n]``) made ready for another strategy.

    They continue from their present alpha, also when ``context`` brings another ramp or range. The earlier strategy's
    memory is cleared; the part of the hold budget that was used stays used.
    """
    span = context.alpha_max - context.alpha_min
    alpha = torch.minimum(torch.maximum(column(state, "alpha"), context.alpha_min), context.alpha_max)
    share = torch.where(span > 0.0, (alpha - context.alpha_min) / span, torch.ones_like(span))
    position = {"elapsed": share * context.ramp, "held": column(state, "held"), "alpha": alpha}
    fresh = with_columns(initial_state(len(state), state.device), position | {"stable": position["elapsed"]})
    return torch.where(rows.unsqueeze(1), fresh, state)


def longest_ramp(config: GraftingConfig, ramp: int) -> int:
    """Ticks, not counting paused ones, after which a branch has reached ``alpha_max`` under any signals."""
    max_hold = config.max_hold if isinstance(config, HoldingConfig) else 0.0
    return ramp if max_hold == 0.0 else math.ceil(ramp * (1.0 + max_hold)) + 1
