"""``custom``: a rule of the user's own, an object with ``signals`` and ``plan(state, context) -> Plan``.

The ramp, its end, the hold budget and the aborts stay those that all strategies share. For its memory a rule has the
columns ``own_0`` … ``own_3`` of the state (``column`` reads one, ``Plan.updates`` writes them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.errors import UserError
from esper.grafting.base import GraftingContext, GraftingOutput, Plan, Strategy
from esper.grafting.config import GraftingConfig, HoldingConfig

NAME = "custom"


class Rule(Protocol):
    """How fast α climbs; vectorised over the ``n`` branches that graft."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Fields of the context that it reads: one that is not finite aborts the branch."""

    def plan(self, state: Tensor, context: GraftingContext) -> Plan:
        """The ticks of ramp to cover now, ``[n]``; ``state`` is ``[n, STATE_WIDTH]``."""


@dataclass
class CustomStrategy(HoldingConfig):
    """The shared settings and the rule."""

    name: str = NAME
    rule: Any = None
    error: Exception | None = None
    """The rule's exception at the last tick; its branches then held their α."""


class _Custom(Strategy):
    """Asks the rule that the settings hold."""

    def step(self, config: GraftingConfig, state: Tensor, context: GraftingContext) -> GraftingOutput:
        assert isinstance(config, CustomStrategy) and config.rule is not None, config
        rule: Rule = config.rule
        held = Strategy(NAME, CustomStrategy, tuple(rule.signals), lambda config, state, context: rule.plan(state, context))
        try:
            return held.step(config, state, context)
        except UserError:
            raise
        except Exception as error:  # whatever the rule's code raises, and what cannot be done with a plan of another shape
            config.error = error
            wait = Plan(torch.zeros(len(state), device=state.device), {}, config.max_hold)
            return Strategy(NAME, CustomStrategy, (), lambda *_: wait).step(config, state, context)


def strategy_of(rule: Any) -> CustomStrategy:
    """Settings that run on ``rule``. Raises UserError for an object that is none."""
    if not callable(getattr(rule, "plan", None)) or not isinstance(getattr(rule, "signals", None), tuple):
        raise UserError(
            f"{type(rule).__name__} is no grafting rule: it needs a tuple 'signals' and a method plan(state, context); "
            "see docs/own-strategy.md."
        )
    return CustomStrategy(rule=rule)


def _no_plan(*_: Any) -> Plan:
    raise NotImplementedError("the plan is the rule's: see _Custom.step")


CUSTOM = _Custom(NAME, CustomStrategy, (), _no_plan)
