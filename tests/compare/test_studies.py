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
from esper.config import conf_folder, plain
from esper.running.run import run
from esper.tracking.run_info import flatten


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
        ended = {"seconds": {"total": 900.0}, "environment": known, "status": "FINISHED", "macs": 7, "fingerprint": "f"}
        (job / "summary.json").write_text(json.dumps(ended | {"metrics": {"final": {"test/accuracy": 0.5 + number}}}))
        (job / "config.yaml").write_text(f"arm: grown\nseed: {number}\noptimizer: {{lr: {0.1 * (number + 1)}}}\nmodel: {{width: 6}}\n")
        (job / "job.log").write_text(f"2026-01-01 {begin} INFO esper: begins\nno date\n2026-01-01 {end} INFO esper: ends\n")
    program = [sys.executable, str(checkout / "experiments" / "write_up.py"), str(sweep), str(study)]
    subprocess.run(program, check=True, env=os.environ | {"PYTHONPATH": str(checkout)})
    text = (study / "README.md").read_text(encoding="utf-8")
    assert (study / "runs.csv").read_text().splitlines() == [
        "kind,arm,seed,optimizer.lr,test/accuracy,macs,seconds,status",
        "compared,grown,0,0.1,0.5,7,900.0,FINISHED",
        "compared,grown,1,0.2,1.5,7,900.0,FINISHED",
    ]
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


@pytest.mark.usefixtures("whole_runs")
def test_every_net_of_the_growth_map_ends_with_as_many_blocks_and_grown_ones_cost_what_their_names_say(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("".join(chr(97 + (number * k * k + k) % 23) for k in range(600)))
    words = [f"task.path={text}", f"task.cache={tmp_path / 'cache'}", "task.held_out_bytes=1000", "trainer.steps=40"]
    found = {}
    for arm in experiment("growth_map")["hydra"]["sweeper"]["params"]["arm"].split(","):
        config = compose(["experiment=growth_map_quick", f"arm={arm}", *words, "tracking=none", "trainer.batch_size=2"])
        found[arm] = run(config, tmp_path / arm, quiet=True).summary
    sizes = {arm: summary["parameters"]["after"] for arm, summary in found.items()}
    assert sizes["quarter"] < sizes["half"] < sizes["deep"]
    assert {sizes[arm] for arm in sizes if arm not in ("half", "quarter")} == {sizes["deep"]}
    block = (found["deep"]["macs"] - found["half"]["macs"]) / 2  # those of one block for all steps
    saved = {arm: (found["deep"]["macs"] - found[arm]["macs"]) / (4 * block) for arm in ("half_50", "half_75", "quarter_50", "quarter_75")}
    assert saved == pytest.approx({"half_50": 0.25, "half_75": 0.375, "quarter_50": 0.375, "quarter_75": 0.5625}, abs=0.08)


@pytest.mark.usefixtures("whole_runs")
def test_the_nets_of_the_study_of_reasoning_end_alike_and_their_problems_are_measured(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (number * number) % 23) for number in range(20_000)))
    words = [f"task.path={text}", f"task.cache={tmp_path}", "task.held_out_bytes=1000", "task.train=200", "task.held_out=20"]
    found = {}
    for arm in ("half_50", "deep", "half"):
        config = compose(["experiment=reason_quick", f"arm={arm}", *words, "trainer.steps=20", "trainer.batch_size=2", "tracking=none"])
        found[arm] = run(config, tmp_path / arm, quiet=True, controls=()).summary
    sizes = {arm: summary["parameters"]["after"] for arm, summary in found.items()}
    assert sizes["half"] < sizes["half_50"] == sizes["deep"]
    assert 0.7 < found["half_50"]["macs"] / found["deep"]["macs"] < 0.8 and found["half_50"]["seeds"]["germinated"] == 1
    for summary in found.values():
        ended = summary["metrics"]["final"]
        kinds = [ended[f"test/{kind}"] for kind in ("copying", "assignment_0", "assignment_1", "assignment_2", "adding")]
        assert ended["test/solved"] == pytest.approx(sum(kinds) / 5) and ended["test/text_loss"] > 0.0


@pytest.mark.usefixtures("whole_runs")
def test_the_arms_of_the_study_of_the_default_run_are_what_they_are_called(tmp_path: Path) -> None:
    def of(*words: str) -> dict[str, Any]:
        brief = ["experiment=digits_why_quick", "tracking=none", "trainer.control=false", "seed=3", *words]
        return dict(run(compose(brief), tmp_path / words[0], quiet=True).summary)

    plain, unfrozen = of("arm=plain", "trainer.steps=2"), of("arm=unfrozen", "trainer.steps=300")
    assert plain["parameters"]["after"] == pytest.approx(3207, rel=0.01)  # the mean of experiments/digits_growth
    kept = [branch for branch in unfrozen["branches"] if branch.get("alpha", 0.0) > 0.0]
    assert kept and {branch["stage"] for branch in kept} == {"FINE_TUNING"}
    assert unfrozen["seeds"]["fossilized"] == 0


@pytest.mark.usefixtures("whole_runs")
def test_every_grown_cnn_is_the_final_net_in_the_end_and_costs_at_most_four_fifths_of_it(tmp_path: Path) -> None:
    found = {}
    for arm in ("cnn_deep", "cnn_small", "cnn_copy", "cnn_fresh"):
        config = compose(["experiment=growth_cnn", f"arm={arm}", "trainer.steps=50", "trainer.batch_size=4", "tracking=none"])
        found[arm] = run(config, tmp_path / arm, quiet=True, controls=()).summary
    sizes = {arm: summary["parameters"]["after"] for arm, summary in found.items()}
    assert sizes["cnn_small"] < sizes["cnn_deep"] == sizes["cnn_copy"] == sizes["cnn_fresh"]
    assert found["cnn_small"]["macs"] < found["cnn_copy"]["macs"] == found["cnn_fresh"]["macs"] <= 0.8 * found["cnn_deep"]["macs"]


@pytest.mark.slow
def test_every_arm_of_the_defaults_changes_only_what_it_is_about() -> None:
    def of(arm: str) -> dict[str, Any]:
        return flatten(plain(compose(["experiment=defaults", "task=digits", f"arm={arm}"])))

    told = of("scheduled")
    differing = {}
    for arm in experiment("defaults")["hydra"]["sweeper"]["params"]["arm"].split(","):
        found = of(arm)
        changed = {key.partition(".")[0] for key in told.keys() | found.keys() if told.get(key) != found.get(key)} - {"arm"}
        differing.setdefault(frozenset(changed), []).append(arm)
    assert differing == {
        frozenset(): ["scheduled"],
        frozenset({"controller"}): ["decided", "several"],
        frozenset({"lifecycle"}): ["no_isolation", "unjudged", "unjudged_macs", "trainable", "trainable_macs"],
        frozenset({"grafting"}): ["at_once"],
        frozenset({"optimizer"}): ["slow_branches", "fast_branches", "cold_branches", "warm_branches"],
    }
