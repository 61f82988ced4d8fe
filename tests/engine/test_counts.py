"""A training step does no more than it did: forwards, optimizer steps, operations, tensors, messages and graphs, counted, not timed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.benchmarks.counts import RESULT, STEPS, counts

OTHER_TORCH = 1.05
"""Another version of torch may decompose an operation otherwise."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return counts()


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return read


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_step_does_no_more_than_what_is_committed(step: str, found: dict[str, Any], committed: dict[str, Any]) -> None:
    then, room = committed["steps"][step], 1.0 if found["torch"] == committed["torch"] else OTHER_TORCH
    more = {name: (then.get(name, 0), count) for name, count in found["steps"][step].items() if count > room * then.get(name, 0)}
    assert not more, f"(committed, now): if it is worth it, say so and run scripts/bench counts --write: {more}"
    assert found["steps"][step]["host forwards"] == then["host forwards"] and found["steps"][step]["optimizer steps"] == 1


@pytest.mark.slow
def test_growing_compiles_no_more_graphs_than_what_is_committed(found: dict[str, Any], committed: dict[str, Any]) -> None:
    assert {name: found["graphs so far"][name] <= count for name, count in committed["graphs so far"].items()} == dict.fromkeys(STEPS, True)
    assert found["graphs so far"]["grafting and telemetry"] == found["graphs so far"]["grafting"], "telemetry compiles nothing"
