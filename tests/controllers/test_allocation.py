"""Allocation: never over budget, near the optimum that an exact solver finds, and indifferent to worthless proposals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from esper.controllers import allocation
from esper.controllers.allocation import allocate


def instance(number: int, count: int, correlated: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Proposals of very different sizes under five budgets, of which a twentieth to a half can be granted."""
    draws = np.random.default_rng([number, count])
    cost = draws.lognormal(0.0, 1.0, (count, 5))
    value = draws.lognormal(0.0, 1.0, count) * (cost.mean(1) if correlated else 1.0)
    return value, cost, cost.sum(0) * draws.uniform(0.05, 0.6, 5)


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("count", [5, 12, 13, 20, 30, 40])
def test_it_is_within_five_percent_of_the_optimum(count: int, correlated: bool):
    for number in range(8):
        value, cost, left = instance(number, count, correlated)
        granted = allocate(value, cost, left)
        assert (cost[granted].sum(0) <= left * (1.0 + 1e-6)).all()
        best = milp(-value, constraints=LinearConstraint(cost.T, ub=left), integrality=np.ones(count), bounds=Bounds(0, 1))
        assert value[granted].sum() >= 0.95 * -best.fun, (number, value[granted].sum(), -best.fun)


def test_a_thousand_proposals_come_close_to_the_bound_of_the_relaxed_problem(monkeypatch: pytest.MonkeyPatch):
    value, cost, left = instance(0, 1000, True)
    fillings = []
    fill = allocation._fill
    monkeypatch.setattr(allocation, "_fill", lambda *given: fillings.append(1) or fill(*given))
    granted = allocate(value, cost, left)
    bound = milp(-value, constraints=LinearConstraint(cost.T, ub=left), bounds=Bounds(0, 1))
    assert value[granted].sum() >= 0.95 * -bound.fun
    most = allocation.ROUNDS + 2 * allocation.FORCED + allocation.FEW_STARTS * allocation.EXCHANGES
    assert len(fillings) <= most, "the work does not grow with the proposals"


def test_budgets_without_a_limit_and_empty_ones():
    value, cost = np.array([1.0, 2.0, 3.0]), np.array([[1.0, 0.0], [1.0, 5.0], [1.0, 0.0]])
    assert allocate(value, cost, np.array([np.inf, np.inf])).all()
    assert allocate(value, cost, np.array([np.inf, 0.0])).tolist() == [True, False, True]
    assert allocate(value, cost, np.array([1.0, -4.0])).tolist() == [False, False, True]
    assert not allocate(np.zeros(0), np.zeros((0, 2)), np.ones(2)).any()


def test_what_is_worth_nothing_or_not_known_is_not_granted():
    value = np.array([0.0, -1.0, np.nan, np.inf, 0.5])
    assert allocate(value, np.ones((5, 1)), np.array([10.0])).tolist() == [False, False, False, False, True]
