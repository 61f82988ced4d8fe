"""A short slice of `scripts/chaos bus`, whose last full result is beside it."""

from __future__ import annotations

import json
from pathlib import Path

import chaos
import pytest
from chaos_run import RunEpisode
from chaos_stream import StreamEpisode

RESULT = Path(__file__).resolve().parents[2] / "scripts" / "chaos_suites" / "bus.json"


@pytest.mark.usefixtures("processes")
def test_ten_random_faults_lose_nothing_double_nothing_and_keep_order():
    outcome = chaos.episode(StreamEpisode, seed=1000, faults=10)
    assert outcome.clean, outcome
    assert outcome.counts["published"] > 0


@pytest.mark.e2e
def test_a_run_whose_controller_tracker_and_server_are_killed_is_as_if_undisturbed():
    outcome = chaos.episode(RunEpisode, seed=1000, faults=("kill controller", "kill tracker", "kill server", "reset connections"))
    assert outcome.clean, outcome
    assert outcome.counts["commands"] > 0 < outcome.counts["rows"]


def test_the_committed_result_is_of_a_thousand_faults_on_streams_and_on_whole_runs_and_clean():
    result = json.loads(RESULT.read_text())
    assert result["clean"]
    assert result["faults"] >= 1000
    assert result["kinds"].keys() >= {"kill server", "kill controller", "kill tracker", "kill trainer"}
    assert sum(result["kinds"].values()) == result["faults"]
    stream, run = result["episodes"]["stream"], result["episodes"]["run"]
    assert stream["faults"] + run["faults"] == result["faults"]
    for found, done in ((stream, "published"), (run, "rows")):
        assert found["faults"] > 0 < found[done]
        assert found["wrong"] == found["dropped"] == 0
    assert stream["lost"] == stream["doubled"] == stream["disordered"] == 0
    assert result["mutated"]["tried"] >= 1_000_000
    assert result["mutated"]["accepted"] == 0
