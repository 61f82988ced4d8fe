"""The posterior against the textbook's formulas, and evidence that adds up in any order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esper.controllers.memory import add_to_file, read_file
from esper.controllers.posterior import Evidence, Posterior
from esper.errors import UserError

WEIGHTS = {"bias": 0.1, "a": 0.5, "b": -0.3}


def decisions(count: int, seed: int = 0) -> list[tuple[dict[str, float], float]]:
    """Features and rewards of a linear world with noise of 0.01."""
    draws = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        features = {"bias": 1.0, "a": float(draws.normal()), "b": float(draws.normal())}
        reward = sum(WEIGHTS[name] * value for name, value in features.items())
        made.append((features, reward + 0.01 * float(draws.normal())))
    return made


def evidence(made: list[tuple[dict[str, float], float]]) -> Evidence:
    found = Evidence()
    for features, reward in made:
        found.add(features, reward)
    return found


def posterior(found: Evidence, **prior: float) -> Posterior:
    return Posterior(found, prior, prior_precision=1.0, shape=2.0, scale=0.01)


def test_it_is_the_ridge_regression_with_its_uncertainty():
    found = evidence(decisions(200))
    made = posterior(found)
    x = np.array([[features[name] for name in found.names] for features, _ in decisions(200)])
    r = np.array([reward for _, reward in decisions(200)])
    exact = np.linalg.inv(x.T @ x + np.eye(3))
    assert np.allclose(made.mean, exact @ x.T @ r)
    draws = made.draw(np.random.default_rng(1), 20_000)
    variance = made.scale / (made.shape - 1.0) * exact
    assert np.allclose(np.cov(draws.T), variance, atol=3e-2 * float(np.abs(variance).max()))
    point = np.array([1.0, 2.0, 0.0])
    assert made.spread(point) == pytest.approx(float(np.sqrt(point @ variance @ point)), rel=1e-6)


def test_without_evidence_it_is_the_prior():
    found = Evidence()
    found.know(["bias", "a"])
    made = posterior(found, bias=0.3)
    assert made.mean.tolist() == [0.3, 0.0]
    assert made.noise == pytest.approx(0.1)


def test_the_evidence_of_runs_adds_up_in_any_order_and_survives_json():
    first, second = decisions(20, 1), [({"c": 2.0, "a": 1.0}, 0.7), *decisions(10, 2)]
    whole = evidence([*first, *second])
    one, other = evidence(first), evidence(second)
    one.merge(Evidence.from_state(json.loads(json.dumps(other.state()))))
    assert one.n == whole.n == 31 and one.names == whole.names
    assert np.allclose(one.A, whole.A) and np.allclose(one.h, whole.h) and one.q == pytest.approx(whole.q)
    again = Evidence.from_state(json.loads(json.dumps(one.state())))
    assert np.array_equal(again.A, one.A) and np.array_equal(again.h, one.h), "to the bit"


def test_a_memory_file_holds_every_run_once(tmp_path):
    path = tmp_path / "memory.json"
    assert read_file(path).n == 0
    add_to_file(path, evidence(decisions(5)))
    add_to_file(path, evidence(decisions(7, 1)))
    add_to_file(path, evidence(decisions(5)))
    assert read_file(path).n == 12


@pytest.mark.parametrize("content", ["", "[]", '{"runs": [], "evidence": {"names": ["a"], "A": [1, 2], "h": [0], "q": 0, "n": 1}}'])
def test_a_file_that_is_no_memory_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "memory.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no controller's memory"):
        read_file(path)
    with pytest.raises(UserError, match="name another file"):
        add_to_file(path, evidence(decisions(1)))
    assert path.read_text() == content
    with pytest.raises(UserError, match="there is no folder"):
        read_file(tmp_path / "nowhere" / "memory.json")
