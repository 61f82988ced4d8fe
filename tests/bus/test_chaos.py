"""A short slice of `scripts/chaos bus`, whose last full result is beside it."""

from __future__ import annotations

import json
from pathlib import Path

import chaos

RESULT = Path(__file__).resolve().parents[2] / "scripts" / "chaos_suites" / "bus.json"


def test_ten_random_faults_lose_nothing_double_nothing_and_keep_order():
    outcome = chaos.episode(seed=1000, faults=10)
    assert outcome.clean, outcome
    assert outcome.published > 0


def test_the_committed_result_is_of_a_thousand_faults_and_clean():
    result = json.loads(RESULT.read_text())
    assert result["clean"]
    assert result["faults"] >= 1000
    assert result["mutated"]["tried"] >= 1_000_000
