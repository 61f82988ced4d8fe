"""What holds for every strategy: pauses, aborts, hand-overs, bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import UserError
from esper.grafting import (
    CONFIGS,
    STATE_WIDTH,
    STRATEGIES,
    STRATEGY_NAMES,
    GraftingContext,
    hand_over,
    initial_state,
    longest_ramp,
    step_many,
)
from tests.examples import examples

EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
NAN, INF = float("nan"), float("inf")
CALM = {"loss": 1.0, "loss_variance": 0.0, "grad_norm": 1.0, "metric": 0.5, "counterfactual": 0.0}
#: Trouble of every kind that is no reason to abort.
ROUGH = {"loss": 1.0, "loss_variance": 9.0, "grad_norm": 1e6, "drift": 5.0, "metric": 0.0, "counterfactual": -1.0}


def test_an_empty_alpha_range_is_refused_in_words():
    with pytest.raises(UserError, match=r"alpha_min=0\.8 is above grafting\.alpha_max=0\.5"):
        CONFIGS["linear"](alpha_min=0.8, alpha_max=0.5)


@EVERY
def test_a_pause_neither_moves_nor_jumps(name, climb):
    calm = [CALM] * 4
    straight = climb(CONFIGS[name](), calm + calm)
    paused = climb(CONFIGS[name](), calm + [CALM | {"paused": True}] * 50 + calm)
    assert all(o.alpha == paused[3].alpha for o in paused[4:54])
    assert [o.alpha for o in paused[:4] + paused[54:]] == [o.alpha for o in straight]
    assert torch.equal(paused[-1].state, straight[-1].state)


@EVERY
def test_a_branch_paused_from_the_start_stands_at_alpha_min(name, climb):
    assert climb(CONFIGS[name](alpha_min=0.25), [{"paused": True}])[0].alpha == 0.25


@EVERY
@pytest.mark.parametrize("signal", ["metric", "loss", "loss_variance", "grad_norm", "drift", "counterfactual"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_a_signal_that_is_not_finite_aborts_those_who_read_it(name, signal, value, climb):
    before, after = climb(CONFIGS[name](), [CALM, CALM | {signal: value}])
    assert after.abort.item() == (signal in STRATEGIES[name].signals)
    assert math.isfinite(after.alpha.item())
    assert torch.isfinite(after.state).all()
    if after.abort:
        assert after.alpha == before.alpha
        assert torch.equal(after.state, before.state)
        assert not after.done


@EVERY
def test_trouble_aborts_during_a_pause_too(name, climb):
    assert climb(CONFIGS[name](), [{"paused": True, "error_rate": NAN}])[0].abort


@EVERY
def test_what_was_not_measured_is_no_trouble(name, climb):
    unknown = {"metric": NAN, "metric_known": False, "counterfactual": INF, "counterfactual_known": False}
    quiet, blind = ({"loss": 1.0, "grad_norm": 1.0} | extra for extra in ({}, unknown))
    for a, b in zip(climb(CONFIGS[name](), [quiet] * 12), climb(CONFIGS[name](), [blind] * 12), strict=True):
        assert not b.abort
        assert torch.equal(a.state, b.state)


@EVERY
@pytest.mark.parametrize(("rate", "aborts"), [(0.5, False), (0.51, True), (NAN, True)])
def test_an_error_rate_above_one_half_aborts(name, rate, aborts, climb):
    assert climb(CONFIGS[name](), [CALM | {"error_rate": rate}])[0].abort.item() is aborts


@EVERY
def test_it_stays_at_alpha_max_once_there(name, climb):
    ran = climb(CONFIGS[name](alpha_max=0.7), [CALM] * 25 + [ROUGH] * 20)
    first = next(i for i, o in enumerate(ran) if o.done)
    assert all(o.done and o.alpha == torch.tensor(0.7) for o in ran[first:])
    assert not any(o.done for o in ran[:first])


@EVERY
@pytest.mark.parametrize("max_hold", [0.0, 0.5, 2.0])
def test_endless_trouble_cannot_keep_it_from_alpha_max(name, max_hold, climb):
    config = CONFIGS[name]() if name == "linear" else CONFIGS[name](max_hold=max_hold)
    shaken = [ROUGH if t % 7 else CALM for t in range(100)]
    ran = climb(config, shaken, ramp=20)
    assert ran[longest_ramp(config, 20) - 1].done
    assert torch.stack([o.alpha for o in ran]).max() == 1.0


@pytest.mark.parametrize("source", list(STRATEGIES))
@pytest.mark.parametrize("target", list(STRATEGIES))
def test_a_hand_over_goes_on_from_the_present_alpha(source, target, climb):
    half = climb(CONFIGS[source](), [ROUGH] + [CALM] * 4)[-1]
    longer = GraftingContext.quiet(1, ramp=40, alpha_min=0.1)
    state = hand_over(half.state, torch.tensor([True]), longer)
    after = STRATEGIES[target].step(CONFIGS[target](), state, longer)
    rise = after.alpha.item() - max(half.alpha.item(), 0.1)
    assert 0.0 <= rise <= 0.9 / 40 + 1e-6


def test_a_hand_over_keeps_the_other_rows_and_the_ramp_already_given_up(climb):
    state = climb(CONFIGS["drift"](), [ROUGH] * 5)[-1].state.repeat(2, 1)
    after = hand_over(state, torch.tensor([False, True]), GraftingContext.quiet(2, ramp=10))
    assert torch.equal(after[0], state[0])
    assert after[1, 1] == state[1, 1] == 5.0  # held
    assert after[1].count_nonzero() == 1


def test_a_hand_over_into_an_empty_range_is_at_its_end():
    after = hand_over(initial_state(1), torch.tensor([True]), GraftingContext.quiet(1, 10, alpha_min=0.3, alpha_max=0.3))
    assert STRATEGIES["linear"].step(CONFIGS["linear"](), after, GraftingContext.quiet(1, 10, 0.3, 0.3)).done


_signal = st.one_of(st.floats(width=32), st.floats(-2, 2, width=32), st.sampled_from([0.0, 1.0]))
_tick = st.fixed_dictionaries(
    {"paused": st.booleans(), "metric_known": st.booleans(), "counterfactual_known": st.booleans()}
    | dict.fromkeys(("metric", "loss", "loss_variance", "grad_norm", "drift", "counterfactual"), _signal)
    | {"error_rate": st.floats(0, 0.625, width=32)}
)


@given(
    scripts=st.lists(st.tuples(st.integers(0, 6), st.lists(_tick, min_size=12, max_size=12)), min_size=1, max_size=5),
    ramp=st.integers(1, 12),
    low=st.sampled_from([0.0, 0.125]),
    high=st.sampled_from([0.125, 0.9, 1.0]),
)
@settings(max_examples=examples(60))
def test_any_signals_leave_alpha_bounded_the_state_finite_and_rows_independent(scripts, ramp, low, high):
    n = len(scripts)
    index = torch.tensor([strategy for strategy, _ in scripts])
    together, single = initial_state(n), [initial_state(1) for _ in range(n)]
    last, ticks, max_hold = torch.zeros(n), torch.zeros(n), 1.0
    for t in range(12):
        context = GraftingContext.quiet(n, ramp, low, high)
        for name in scripts[0][1][t]:
            values = [script[t][name] for _, script in scripts]
            getattr(context, name).copy_(torch.tensor(values, dtype=getattr(context, name).dtype))
        out = step_many(index, {}, together, context)
        again = step_many(index, {}, together, context)
        assert torch.equal(out.state, again.state)
        assert torch.equal(out.alpha, again.alpha)
        assert out.state.shape == (n, STATE_WIDTH)
        assert torch.isfinite(out.state).all()
        assert ((out.alpha >= context.alpha_min) & (out.alpha <= context.alpha_max)).all()
        for i in range(n):
            alone = step_many(index[i : i + 1], {}, single[i], context.select(torch.tensor([i])))
            assert torch.equal(alone.state[0], out.state[i])
            assert (alone.alpha[0], alone.abort[0], alone.done[0]) == (out.alpha[i], out.abort[i], out.done[i])
            single[i] = alone.state
        falls = index == STRATEGY_NAMES.index("stability")
        falls |= index == STRATEGY_NAMES.index("adaptive")
        assert (falls | (out.alpha >= last)).all()
        ticks += (~out.abort & ~context.paused).float()
        behind = out.state[:, 0] < torch.clamp(ticks - max_hold * ramp, max=float(ramp)) - 1e-3
        assert not behind.any()
        together, last = out.state, out.alpha


def test_no_branches_is_no_work():
    out = step_many(torch.zeros(0, dtype=torch.long), {}, initial_state(0), GraftingContext.quiet(0, 10))
    assert out.alpha.shape == out.abort.shape == out.done.shape == (0,)


def test_step_many_uses_the_settings_it_is_given():
    configs = {"momentum": CONFIGS["momentum"](gain=0.0)}
    index = torch.tensor([STRATEGY_NAMES.index("momentum"), 0])
    state = initial_state(2)
    for metric in (0.0, 1.0):
        context = GraftingContext.quiet(2, 10)
        context.metric.fill_(metric)
        context.metric_known.fill_(True)
        state = step_many(index, configs, state, context).state
    assert state[:, 0].tolist() == [2.0, 2.0]
