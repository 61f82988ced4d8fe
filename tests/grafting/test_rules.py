"""Each strategy's own rule, against values worked out by hand (ramps of 10 ticks)."""

from __future__ import annotations

import pytest
import torch

from esper.grafting import CONFIGS, initial_state
from esper.grafting.drift import weight_drift

CALM = {"loss": 1.0, "loss_variance": 0.0, "grad_norm": 1.0}


def test_linear_is_t_over_ramp(alphas):
    assert alphas(CONFIGS["linear"](), [{}] * 12) == [round(min(t, 10) / 10, 5) for t in range(1, 13)]


def test_linear_spans_its_range(alphas):
    config = CONFIGS["linear"](alpha_min=0.2, alpha_max=0.6)
    assert alphas(config, [{}] * 4, ramp=4) == [0.3, 0.4, 0.5, 0.6]


def test_drift_holds_for_its_pause_and_then_asks_again(alphas):
    config = CONFIGS["drift"](threshold=0.1, pause=0.3)
    calm, moving = {"drift": 0.1}, {"drift": 0.11}
    script = [calm, moving, calm, calm, calm, moving, moving, moving, moving, calm, calm, calm]
    assert alphas(config, script) == [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.3]


def test_drift_is_measured_against_the_average_before_this_tick():
    weights = [torch.tensor([[3.0], [1.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])]
    averages = [torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])]
    drift, after = weight_drift(weights, averages, decay=0.9)
    torch.testing.assert_close(drift, torch.tensor([32**0.5 / 5, 5**0.5 / 2]))
    torch.testing.assert_close(after[0], torch.tensor([[3.0], [0.1]]))


def test_momentum_follows_the_rises_of_the_metric(alphas):
    config = CONFIGS["momentum"](momentum=0.5, gain=10.0, max_speed=2.0)
    script = [{"metric": 0.50}, {"metric": 0.54}, {}, {"metric": 0.53}, {"metric": 0.9}, {"metric": 0.4}]
    # v: 0, 0.4, 0.4, 0.2-0.1, capped at 1, floored at -1
    assert alphas(config, script) == [0.1, 0.24, 0.38, 0.49, 0.69, 0.69]


def test_performance_follows_the_counterfactual_fall_of_the_loss(alphas):
    config = CONFIGS["performance"](sensitivity=10.0, max_speed=1.5)
    script = [{}] + [{"counterfactual": c} if c else {} for c in (0.04, None, 1.0, -0.1, -9.0)]
    speeds = [1.0, 1.2, 1.2, 1.5, 0.5, 0.0]  # the loss is 2
    expected = [round(sum(speeds[: i + 1]) / 10, 5) for i in range(6)]
    assert alphas(config, [{"loss": 2.0} | tick for tick in script]) == expected


def test_grad_norm_holds_outside_its_band_until_the_median_has_moved(alphas):
    config = CONFIGS["grad_norm"](band_low=0.1, band_high=10.0)
    script = [{"grad_norm": g} for g in (1.0, 2.0, 3.0, 20.0, 20.1, 0.19, 0.2, 1.0)]
    # medians before each tick: -, -, -, 2, 2 (lower of 4), 3, 2, 2
    assert alphas(config, script) == [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.5, 0.6]
    lasting = [{"grad_norm": 1.0}] * 5 + [{"grad_norm": 100.0}] * 7
    assert alphas(config, lasting, ramp=100)[4:] == [0.05] * 7 + [0.06]


def test_grad_norm_takes_no_gradient_at_alpha_zero_for_no_measurement(climb):
    config = CONFIGS["grad_norm"]()
    ran = climb(config, [{"grad_norm": 0.0}] + [{"grad_norm": 1.0}] * 3 + [{"grad_norm": 0.0}])
    assert [round(o.alpha.item(), 5) for o in ran] == [0.1, 0.2, 0.3, 0.4, 0.4]


@pytest.mark.parametrize(
    "trouble",
    [{"loss_variance": 0.3}, {"loss": 0.01, "loss_variance": 0.003}, {"grad_norm": 11.0}, {"grad_norm": 0.09}],
)
def test_stability_goes_half_speed_in_trouble(alphas, trouble):
    script = [CALM] * 4 + [CALM | trouble] * 2 + [CALM]
    assert alphas(CONFIGS["stability"](), script) == [0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6]


def test_stability_notices_a_wavering_metric(alphas):
    script = [CALM | {"metric": 0.5 + 0.4 * (-1) ** t} for t in range(4)]
    assert alphas(CONFIGS["stability"](), script) == [0.1, 0.2, 0.25, 0.3]


def test_stability_steps_back_to_the_last_steady_alpha_after_repeated_trouble(alphas):
    loud = CALM | {"loss_variance": 1.0}
    script = [CALM] * 3 + [loud] * 3 + [CALM]
    # alpha 0.3 was set by the third calm tick, and the first loud signals are about it: 0.2 was the last steady one
    assert alphas(CONFIGS["stability"](patience=3), script) == [0.1, 0.2, 0.3, 0.35, 0.4, 0.2, 0.3]


def test_adaptive_is_linear_while_nothing_happens(climb):
    ran = climb(CONFIGS["adaptive"](), [CALM] * 10)
    assert [round(o.alpha.item(), 5) for o in ran] == [round(t / 10, 5) for t in range(1, 11)]


def test_adaptive_changes_only_after_patience_and_beyond_the_margin(climb, choice_of):
    config = CONFIGS["adaptive"](patience=3, margin=0.1, score_weight=0.0)
    little, much = CALM | {"drift": 0.11}, CALM | {"drift": 0.3}
    ran = climb(config, [CALM, little, little, little, much, much, CALM, much, much, much], ramp=100)
    assert [choice_of(o) for o in ran] == ["linear"] * 9 + ["drift"]
    # From the tick it is chosen on, drift's own hold applies.
    assert ran[-1].alpha == ran[-2].alpha


@pytest.mark.parametrize(
    ("choice", "values"),
    [
        ("drift", [{"drift": 1.0}]),
        ("stability", [{"loss_variance": 9.0}]),
        ("performance", [{"counterfactual": 0.5}]),
        ("grad_norm", [{"grad_norm": 1.0}, {"grad_norm": 900.0}]),
        ("momentum", [{"metric": t / 50} for t in range(10)]),
    ],
)
def test_adaptive_picks_what_the_signals_call_for(climb, choice_of, choice, values):
    script = [CALM] * 4 + [CALM | values[min(t, len(values) - 1)] for t in range(8)]
    assert choice_of(climb(CONFIGS["adaptive"](), script, ramp=100)[-1]) == choice


def test_adaptive_pays_the_choice_in_force_by_growing_counterfactual_gain_alone(climb, score_of):
    config = CONFIGS["adaptive"](score_scale=10.0, score_decay=0.9)
    falling = climb(config, [{"loss": 1.0 / (t + 1)} for t in range(5)])[-1]
    assert score_of(falling, "linear") == 0.0
    paid = climb(config, [CALM | {"counterfactual": c} for c in (0.0, 0.01)])[-1]
    assert score_of(paid, "linear") == pytest.approx(0.1 * 10.0 * 0.01, rel=1e-5)
    assert score_of(paid, "drift") == 0.0


def test_adaptive_lets_what_paid_before_win_sooner(climb, choice_of):
    from esper.grafting.state import with_columns

    script = [CALM | {"drift": 0.11}] * 5  # fits drift by 0.55, linear by 0.5
    config = CONFIGS["adaptive"](score_weight=0.25)
    fresh = initial_state(1)
    paid = with_columns(fresh, {"paid_drift": torch.tensor([0.8])})
    assert choice_of(climb(config, script, ramp=100, state=fresh)[-1]) == "linear"
    assert choice_of(climb(config, script, ramp=100, state=paid)[-1]) == "drift"
