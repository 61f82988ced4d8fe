"""Runs a strategy over a script of signals, as the trainer would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from esper.grafting import STRATEGIES, GraftingConfig, GraftingContext, GraftingOutput, initial_state
from esper.grafting.state import CHOICES, column

BOOLS = ("paused", "metric_known", "counterfactual_known")


def _signals(context: GraftingContext, **values: Any) -> GraftingContext:
    """The context with some signals set for all its branches; a given measurement is marked as known."""
    for name in ("metric", "counterfactual"):
        if name in values:
            values.setdefault(f"{name}_known", True)
    n = len(context.ramp)
    kinds = {name: torch.bool if name in BOOLS else torch.float32 for name in values}
    return replace(context, **{k: torch.as_tensor(v, dtype=kinds[k]).expand(n) for k, v in values.items()})


def _climb(
    config: GraftingConfig, script: Sequence[dict[str, Any]], ramp: float = 10.0, state: torch.Tensor | None = None
) -> list[GraftingOutput]:
    """The outputs of one branch, a tick for each dict of signals in ``script``."""
    state = initial_state(1) if state is None else state
    outputs = []
    for values in script:
        quiet = GraftingContext.quiet(1, ramp, config.alpha_min, config.alpha_max)
        outputs.append(STRATEGIES[config.name].step(config, state, _signals(quiet, **values)))
        state = outputs[-1].state
    return outputs


@pytest.fixture(scope="session")
def signals() -> Callable[..., GraftingContext]:
    """``signals(context, name=value…)``: the context with some signals set and marked as known."""
    return _signals


@pytest.fixture(scope="session")
def climb() -> Callable[..., list[GraftingOutput]]:
    """``climb(config, script, ramp=10, state=None)``: the outputs of one branch, a tick for each dict of signals."""
    return _climb


@pytest.fixture(scope="session")
def alphas(climb: Callable[..., list[GraftingOutput]]) -> Callable[..., list[float]]:
    """``alphas(config, script, ramp=10)``: alpha after each tick, rounded to what float32 holds."""
    return lambda *args, **kwargs: [round(output.alpha.item(), 5) for output in _climb(*args, **kwargs)]


@pytest.fixture(scope="session")
def choice_of() -> Callable[[GraftingOutput], str]:
    """The name of the strategy that ``adaptive`` has chosen for the first branch."""
    return lambda output: CHOICES[int(column(output.state, "choice")[0])]


@pytest.fixture(scope="session")
def score_of() -> Callable[[GraftingOutput, str], float]:
    """``adaptive``'s score of a choice, for the first branch."""
    return lambda output, name: column(output.state, f"paid_{name}")[0].item()
