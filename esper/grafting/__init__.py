"""Grafting: how alpha climbs while a branch is blended in. One strategy a file; see ``docs/grafting.md``."""

from typing import TYPE_CHECKING

from esper.grafting.config import CONFIGS, GraftingConfig, HoldingConfig
from esper.lazy_imports import names_of

if TYPE_CHECKING:
    from esper.grafting.base import GraftingContext, GraftingOutput, Plan, Strategy, hand_over, longest_ramp
    from esper.grafting.custom import CustomStrategy, Rule, strategy_of
    from esper.grafting.state import COLUMNS, STATE_WIDTH, initial_state
    from esper.grafting.strategies import STRATEGIES, STRATEGY_NAMES, signals_of, step_many

__all__ = [
    "COLUMNS",
    "CONFIGS",
    "STATE_WIDTH",
    "STRATEGIES",
    "STRATEGY_NAMES",
    "CustomStrategy",
    "GraftingConfig",
    "GraftingContext",
    "GraftingOutput",
    "HoldingConfig",
    "Plan",
    "Rule",
    "Strategy",
    "hand_over",
    "initial_state",
    "longest_ramp",
    "signals_of",
    "step_many",
    "strategy_of",
]

_MODULES = {
    "esper.grafting.base": ("GraftingContext", "GraftingOutput", "Plan", "Strategy", "hand_over", "longest_ramp"),
    "esper.grafting.custom": ("CustomStrategy", "Rule", "strategy_of"),
    "esper.grafting.state": ("COLUMNS", "STATE_WIDTH", "initial_state"),
    "esper.grafting.strategies": ("STRATEGIES", "STRATEGY_NAMES", "signals_of", "step_many"),
}
__getattr__ = names_of(__name__, {name: module for module, names in _MODULES.items() for name in names})
