"""The ramp that all strategies share: its end value is exact, and time given up is never given back."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from esper.grafting import CONFIGS, GraftingContext, Plan, initial_state
from esper.grafting.base import advance_ramp, alpha_at
from esper.grafting.state import column


def test_at_its_end_alpha_is_the_end_value_to_the_bit_whatever_the_range() -> None:
    hundredths = [number / 100 for number in range(101)]  # 0.01 + (0.05 - 0.01) is not 0.05 in float32, for example
    for low, high in itertools.combinations(hundredths, 2):
        context = GraftingContext.quiet(1, 7.0, low, high)
        assert torch.equal(alpha_at(context.ramp, context), context.alpha_max), (low, high)


def test_a_fast_tick_does_not_give_back_the_time_that_was_held() -> None:
    context = GraftingContext.quiet(1, 10.0)
    state = initial_state(1)
    for advance in (0.0, 0.0, 2.0, 2.0):
        state = advance_ramp(state, Plan(torch.tensor([advance]), {}, max_hold=1.0), context)
    assert column(state, "held").item() == 2.0
    assert column(state, "elapsed").item() == 4.0


def test_a_hold_for_drift_lasts_as_long_as_it_was_begun_for(alphas: Callable[..., list[float]]) -> None:
    config = CONFIGS["drift"](threshold=0.1, pause=0.3)
    drifts = [1.0, 1.0, 0.0, 0.0, 0.0]
    assert alphas(config, [{"drift": drift} for drift in drifts]) == [0.0, 0.0, 0.0, 0.1, 0.2]
