"""One run from the command line in which a network grows, one that is interrupted, one that grows nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from esper import load_model
from esper.cli.compose import compose
from esper.running.builders import build_host
from tests.here import here

pytestmark = pytest.mark.e2e
STAGES = ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]


def tables(folder: Path) -> tuple[Any, Any]:
    import pandas

    return pandas.read_parquet(folder / "transitions.parquet"), pandas.read_parquet(folder / "seeds.parquet")


def test_a_network_grows_on_real_data_from_one_command(esper: Any, tmp_path: Path):
    done = esper("trainer.steps=800", "trainer.control=false", "tracking=csv", "output=out")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["status"] == "FINISHED" and summary["seeds"]["fossilized"] >= 1
    assert summary["parameters"]["after"] > summary["parameters"]["before"]
    kept = [branch for branch in summary["branches"] if branch["stage"] == "FOSSILIZED"]
    assert all([stage for stage, _ in branch["path"]] == STAGES for branch in kept), "through every stage"
    assert all(branch["gain_bound"] > 0.0 for branch in kept)
    assert all(summary["gates"][gate]["passed"] >= 1 for gate in ("readiness", "ramp", "stability", "gain", "final_gain"))
    assert sum(summary["macs_by_pass"].values()) == summary["macs"] > 0
    transitions, seeds = tables(path.parent)
    assert len(transitions) == sum(len(branch["path"]) for branch in summary["branches"])
    assert len(seeds) > 0 and "NOTHING" not in done.stdout
    assert summary["metrics"]["final"]["test/accuracy"] > 0.4, "the host learnt too"


def test_on_a_frozen_host_only_what_grows_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["trainer.freeze_host=true", "trainer.steps=400", "trainer.control=false", "tracking=none", "optimizer.weight_decay=0.1"]
    done = here(*words, "output=out")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["seeds"]["fossilized"] >= 1 and summary["metrics"]["final"]["test/accuracy"] > 0.3
    config = compose(words)
    host, grown = build_host(config, config.task.build()).state_dict(), load_model(path.parent).state_dict()
    for name, value in host.items():
        parent, _, leaf = name.rpartition(".")
        assert torch.equal(value, grown[name] if name in grown else grown[f"{parent}.module.{leaf}"]), name
    assert len(grown) > len(host)


def test_a_run_that_grew_nothing_says_so_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = here("trainer.steps=60", "trainer.control=false", "tracking=none", "controller=none", "output=out")
    assert done.returncode == 0, done.stderr
    assert "NOTHING" in done.stdout
    (path,) = (tmp_path / "out").glob("*/*/summary.json")
    assert set(json.loads(path.read_text())["seeds"].values()) == {0}


def test_an_interrupted_run_is_killed_and_keeps_everything_so_far(interrupted: Any, tmp_path: Path):
    words = ["tracking=csv", "trainer.control=false", "trainer.steps=100000", "output=out", "controller=scheduled"]
    words += ["controller.script=[{at: 5step, command: germinate, seeds: [0]}]", "lifecycle.training_min=20step"]
    code, rest = interrupted(words, b"grafting", signal.SIGINT)  # the progress bar counts a seed in GRAFTING
    assert code == 130 and "Traceback" not in rest
    (path,) = (tmp_path / "out").glob("*/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["status"] == "KILLED" and 0 < summary["steps"] < 100000 and summary["seeds"]["germinated"] > 0
    transitions, seeds = tables(path.parent)
    assert len(transitions) == sum(len(branch["path"]) for branch in summary["branches"]) > 0
    assert len(seeds) > 0
