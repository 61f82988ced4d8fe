"""A sweep trains the controls that its report shows, and none that is an arm already."""

import dataclasses
import json
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from esper.cli.compose import compose
from esper.compare.results.analysis import analyse
from esper.compare.results.plan import Plan
from esper.compare.results.report import show
from esper.compare.sweep import worker as worker
from esper.compare.sweep.arms import Job
from esper.compare.sweep.dependencies import controls_to_train
from esper.compare.sweep.sweep import PreparedJob, TuningJob, runs_of

pytestmark = pytest.mark.usefixtures("whole_runs")

BRIEF = ["tracking=none", "trainer.steps=20", "trainer.validate_every=50%", "trainer.checkpoint_every=", "trainer.save=false"]
BOTH = ["same_steps", "same_macs"]


composed = cache(lambda *words: compose([*BRIEF, *words]))


def jobs_of(
    arms: dict[str, list[str]], *words: str, folder: Path = Path("nowhere"), seeds: int = 1, kind: type[Job] = Job
) -> list[PreparedJob]:
    found = []
    for arm, own in arms.items():
        for seed in range(seeds):
            config = dataclasses.replace(composed(*words, *own), seed=seed, output=str(folder))
            found.append(PreparedJob(kind(len(found), (), arm, "", seed), config, {}, folder / f"{arm}-{seed}"))
    return found


def trained(jobs: list[PreparedJob]) -> list[list[str]]:
    return [controls_to_train(one, jobs) for one in jobs]


ARMS = {"grown": [], "drift": ["grafting=drift"]}


def test_a_sweep_trains_no_control_unless_it_is_asked_for_and_then_both() -> None:
    assert trained(jobs_of(ARMS)) == [[], []]
    assert trained(jobs_of(ARMS, "trainer.control=false")) == [[], []]
    assert trained(jobs_of(ARMS, "trainer.control=true")) == [BOTH, BOTH]
    assert trained(jobs_of(ARMS, "trainer.control=true", kind=TuningJob)) == [[], []]


def test_the_host_that_may_take_the_grown_ones_place_is_trained_alone() -> None:
    assert trained(jobs_of(ARMS, "trainer.keep=better")) == [["same_steps"]] * 2
    host = {**ARMS, "host": ["controller=none"]}  # its weights are asked for, and an arm's are not kept
    assert trained(jobs_of(host, "trainer.keep=better")) == [["same_steps"], ["same_steps"], []]


def test_no_control_is_trained_that_is_an_arm() -> None:
    asked, host = "trainer.control=true", {"host": ["controller=none"]}
    assert trained(jobs_of({**ARMS, **host}, asked)) == [["same_macs"], ["same_macs"], []]
    other = {"grown": [], "host": ["controller=none", "optimizer.lr=0.5"]}  # a host alone, and not the one of this arm
    assert trained(jobs_of(other, asked)) == [BOTH, []]
    longer = [asked, "compare.equal_macs={host: grown/host}"]
    assert trained(jobs_of({**ARMS, **host}, *longer)) == [["same_steps"], BOTH, []]
    fresh = [asked, "compare.fresh_seeds={host: 1000}"]
    assert trained(jobs_of({**ARMS, **host}, *fresh)) == [BOTH, BOTH, []]


def test_the_controls_experiment_trains_its_arms_and_nothing_else() -> None:
    arms = {name: [f"arm={name}"] for name in ("grown", "host", "scratch", "scratch_macs", "all_on", "random_places", "naive")}
    assert trained(jobs_of(arms)) == [[]] * 7


def test_a_host_alone_is_its_own_control(tmp_path: Path) -> None:
    (one,) = jobs_of({"host": ["controller=none", "trainer.control=true"]}, folder=tmp_path)
    job(one, ["same_steps"])  # said by nobody, to see that the two are the same
    assert one.summary["control"]["same_steps"] == one.summary["metrics"]["final"]
    assert trained([one]) == [[]]


def job(one: PreparedJob, controls: list[str]) -> None:
    request = one.request("run") | {"controls": controls}
    one.folder.mkdir(parents=True, exist_ok=True)
    worker._train(request, one.folder, lambda report: True)


def test_the_report_shows_the_controls_that_were_trained(tmp_path: Path) -> None:
    jobs = jobs_of({**ARMS, "host": ["controller=none"]}, "trainer.control=true", folder=tmp_path, seeds=1)
    for one in jobs:
        job(one, controls_to_train(one, jobs))
    assert [list(one.summary.get("control", {})) for one in jobs] == [["same_macs"], ["same_macs"], []]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "controls").glob("*.json")]
    price = jobs[2].summary["macs"] / 20  # of a step of the host alone, which is an arm
    assert kept and all(any(abs(made["macs"] - one.summary["macs"]) <= price for made in kept) for one in jobs[:2])
    plan = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "grown", {one.job.arm: {"arm": one.job.arm} for one in jobs}, (0,))
    result = analyse(runs_of(jobs, "accuracy"), plan)
    assert [arm.alone for arm in result.arms] == [
        {"same_macs": one.summary["control"]["same_macs"]["test/accuracy"]} if "control" in one.summary else {} for one in jobs
    ]
    out = StringIO()
    show(result, plan, Console(file=out, width=160))
    assert "host alone, same MACs" in out.getvalue() and "host alone, same steps" not in out.getvalue()


def test_a_job_without_shown_controls_trains_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.running import run as running

    monkeypatch.setattr(running, "control_run", lambda *_: pytest.fail("a control was trained"))
    (one,) = jobs_of({"grown": []}, folder=tmp_path)
    job(one, controls_to_train(one, [one]))
    assert one.summary["status"] == "FINISHED" and "control" not in one.summary
