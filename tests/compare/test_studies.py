"""The studies under conf/experiment can show what they ask."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from esper.cli.compose import compose
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import TuningCandidate, TuningResult, with_tuned
from esper.compare.results.plan import Plan, save_plan
from esper.compare.results.report import write_results
from esper.compare.results.runs import Run
from esper.config import conf_folder
from esper.running.run import run


def experiment(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.e2e
def test_no_strategy_of_the_grafting_study_does_what_linear_does(tmp_path: Path) -> None:
    """In a twelfth of the study's length, so with a twelfth of its signals."""
    paths: dict[str, tuple[Any, ...]] = {}
    for arm in experiment("ab_grafting")["hydra"]["sweeper"]["params"]["grafting"].split(","):
        words = ["trainer.steps=120", "telemetry.every=5", "trainer.governor=false", "trainer.save=false", "trainer.checkpoint_every=''"]
        run(compose(["experiment=ab_grafting", f"grafting={arm}", *words, "tracking=none"]), tmp_path / arm, quiet=True)
        seen = pd.read_parquet(tmp_path / arm / "seeds.parquet")
        blending = seen[(seen.stage_name == "GRAFTING") & (seen.alpha > 0.0)]
        assert len(blending) > 10
        paths[arm] = tuple(blending.set_index(["site", "seed", "tick"]).alpha.items())
    assert len(paths) == 7
    assert [arm for arm, path in paths.items() if arm != "linear" and path == paths["linear"]] == []


@pytest.mark.usefixtures("processes")
def test_a_study_is_written_up_with_its_cost_in_seconds_and_its_ranking(tmp_path: Path, checkout: Path) -> None:
    sweep, study = tmp_path / "sweep", tmp_path / "study"
    study.mkdir()
    (study / "question.md").write_text("# Which?\n\n**Question.** Which one?\n")
    arms = {"host": 0.5, "grown": 0.7, "naive": 0.6}
    costs = {"macs": 1000.0, "seconds": 21.75, "parameters": 30.0}
    runs = [
        Run(arm, seed, mean + 0.001 * (seed % 5), costs=costs | {"seconds": costs["seconds"] + seed - 7})
        for arm, mean in arms.items()
        for seed in range(15)
    ]
    settings = {arm: {"arm": arm} for arm in arms}
    plan = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "host", settings, tuple(range(15)), ranking=True)
    tried = (TuningCandidate({"optimizer.lr": 0.1}, 0.7, 3, 0), TuningCandidate({"optimizer.lr": 9.0}, math.nan, 3, 1))
    comparison = with_tuned(analyse(runs, plan), [TuningResult("grown", "", {"optimizer.lr": 0.1}, tried, 5000.0)])
    write_results(comparison, plan, sweep, figures=False)
    save_plan(plan, sweep)
    (sweep / "sweep.json").write_text(json.dumps({"command": ["-m", "arm=host,grown,naive", f"output={tmp_path}"]}))
    git = {"commit": "0" * 40, "changed": False}
    known = {"device": "cpu", "gpu": "", "threads": 1, "python": "3", "packages": {"torch": "2"}, "git": git}
    for number, (begin, end) in enumerate((("10:00:00,000", "10:20:00,000"), ("10:10:00,500", "10:36:00,000"))):
        job = sweep / f"{number}-0abc"
        job.mkdir()
        (job / "summary.json").write_text(json.dumps({"seconds": {"total": 900.0}, "environment": known}))
        (job / "job.log").write_text(f"2026-01-01 {begin} INFO esper: begins\nno date\n2026-01-01 {end} INFO esper: ends\n")
    program = [sys.executable, str(checkout / "experiments" / "write_up.py"), str(sweep), str(study)]
    subprocess.run(program, check=True, env=os.environ | {"PYTHONPATH": str(checkout)})
    text = (study / "README.md").read_text(encoding="utf-8")
    assert "| grown | 0.702 | 0 of 15 | 1e+03 | 21.8 | 30 |" in text
    assert "0.50 hours of training loop in all, 0.60 hours of wall time" in " ".join(text.split())
    ranking = text[text.index("**All against all** (3 pairs of arms, after Holm: 3 decided, 0 equivalent, 0 inconclusive).") :]
    rows = [line for line in ranking.splitlines() if line.startswith("| ")][1:]
    assert rows == ["| grown | 0.702 | host, naive |", "| naive | 0.602 | host |", "| host | 0.502 | – |"]
    assert "grown was tuned to optimizer.lr=0.1 for 5e+03 MACs" in text and "optimizer.lr=9.0: –, 1 of 3 failed" in text
    assert "1 of 6 tuning runs of grown failed" in text


def test_a_study_gives_every_ramp_the_time_that_holding_may_cost_it() -> None:
    config = compose(["experiment=ab_grafting", "grafting=drift"])
    ramp, limit = (float(text.rstrip("%")) for text in (config.grafting.ramp, config.lifecycle.grafting_max))
    assert limit >= ramp * (1.0 + config.grafting.max_hold)
