"""All grafting strategies by name, and one tick of branches that each climb under their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.grafting.adaptive import ADAPTIVE
from esper.grafting.base import GraftingContext, GraftingOutput, Strategy
from esper.grafting.config import CONFIGS, GraftingConfig
from esper.grafting.custom import CUSTOM, CustomStrategy
from esper.grafting.drift import DRIFT
from esper.grafting.grad_norm import GRAD_NORM
from esper.grafting.learned import LEARNED
from esper.grafting.linear import LINEAR
from esper.grafting.momentum import MOMENTUM
from esper.grafting.performance import PERFORMANCE
from esper.grafting.stability import STABILITY

#: By name; branches and checkpoints hold the names.
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (LINEAR, DRIFT, MOMENTUM, ADAPTIVE, STABILITY, GRAD_NORM, PERFORMANCE, LEARNED)
}
#: ``custom`` is the user's own rule: it has no defaults to run on, so it is no option of the package.
STRATEGY_NAMES: tuple[str, ...] = (*STRATEGIES, CUSTOM.name)


def step_many(strategy_index: Tensor, configs: Mapping[str, GraftingConfig], state: Tensor, context: GraftingContext) -> GraftingOutput:
    """One tick of ``n`` branches, each under its own strategy.

    Args:
        strategy_index: int64 ``[n]``, positions in STRATEGY_NAMES. It is read on the CPU: kept elsewhere, each call
            waits for the device once.
        configs: the settings by strategy name; a strategy not named runs on its defaults.
        state: float32 ``[n, STATE_WIDTH]``, not written to.
        context: signals of the same ``n`` branches.
    """
    present = sorted(set(strategy_index.tolist()))
    if len(present) == 1:
        return _step_one(present[0], configs, state, context)
    alpha, after = torch.zeros_like(context.alpha_min), state.clone()
    abort, done = torch.zeros_like(context.paused), torch.zeros_like(context.paused)
    for index in present:
        rows = (strategy_index == index).nonzero().squeeze(1).to(state.device)
        part = _step_one(index, configs, state[rows], context.select(rows))
        alpha[rows], after[rows], abort[rows], done[rows] = part.alpha, part.state, part.abort, part.done
    return GraftingOutput(alpha, after, abort, done)


def signals_of(config: GraftingConfig) -> tuple[str, ...]:
    """The fields of the context that a strategy reads; the engine does not measure them for others."""
    return tuple(config.rule.signals) if isinstance(config, CustomStrategy) else STRATEGIES[config.name].signals


def _step_one(index: int, configs: Mapping[str, GraftingConfig], state: Tensor, context: GraftingContext) -> GraftingOutput:
    name = STRATEGY_NAMES[index]
    if name == CUSTOM.name:
        return CUSTOM.step(configs[name], state, context)
    return STRATEGIES[name].step(configs.get(name) or CONFIGS[name](), state, context)
