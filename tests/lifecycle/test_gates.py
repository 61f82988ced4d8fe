"""Gates fail closed, and looking often does not make a wrong yes likelier."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.lifecycle import GATES, Stage, passes, spent
from esper.lifecycle.transitions import EXITS


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [-1e9, 0.0, -math.inf])
def test_a_value_that_is_missing_or_not_finite_passes_no_gate(value: float | None, threshold: float):
    assert passes(value, threshold) is False


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_not_finite_lets_nothing_pass(threshold: float):
    assert passes(1e9, threshold) is False


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_a_finite_value_passes_where_it_reaches_the_threshold(value: float, threshold: float):
    assert passes(value, threshold) == (value >= threshold)


def test_every_step_forward_but_the_first_has_a_gate():
    forward = {pair: GATES.get(pair) for pair in zip(list(Stage)[2:7], list(Stage)[3:8], strict=True)}
    assert list(forward.values()) == ["readiness", "ramp", "stability", "gain", "final_gain"]
    assert all(target in EXITS[source] for source, target in GATES)


@given(st.floats(1e-6, 0.5), st.integers(1, 3000))
def test_all_looks_together_spend_at_most_the_significance(significance: float, looks: int):
    total = math.fsum(spent(significance, look) for look in range(1, looks + 1))
    assert total <= significance
    assert total == pytest.approx(significance * looks / (looks + 1))


def test_looks_are_counted_from_one():
    with pytest.raises(ValueError, match="from 1"):
        spent(0.05, 0)
