"""The order in which a sweep's jobs run, what they take from each other, and what is not run again.

The worker here answers at once with a summary it makes up; real workers are in test_sweep.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from esper.cli.compose import check_jobs, compose
from esper.compare.config import CompareConfig
from esper.compare.results import mlflow_sweep as page
from esper.compare.results.comparison import TuningCandidate, parse_tuning, tuning_text
from esper.compare.results.plan import make_plan
from esper.compare.results.report import show
from esper.compare.sweep.arms import lay_out
from esper.compare.sweep.dependencies import run_order
from esper.compare.sweep.mlflow_process import MlflowProcess
from esper.compare.sweep.plan_sweep import arm_settings, plan_sweep
from esper.compare.sweep.run_sweep import judge_sweep, run_jobs
from esper.compare.sweep.sweep import PreparedJob, Sweep
from esper.compare.sweep.tuning import tuning_jobs
from esper.compare.sweep.worker import describe
from esper.config import RootConfig, build, config_hash
from esper.errors import UserError
from esper.tracking.config import MlflowConfig

#: (config, folder) -> (test accuracy, status)
Outcome = Callable[[RootConfig, Path], tuple[float, str]]


class InstantWorkers:
    """Runs nothing: writes the summary of a run whose accuracy ``outcome`` decides."""

    size, away = 1, False

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ran: list[RootConfig] = []

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return describe(request)

    def run(self, requests: Iterable[dict[str, Any] | None], started: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, request in enumerate(requests):
            assert request is not None, "one job at a time, so that there is always one that can begin"
            config, folder = build(request["config"], {}), Path(request["folder"])
            self.ran.append(config)
            value, status = self.outcome(config, folder)
            folder.mkdir(parents=True, exist_ok=True)
            summary = {
                "status": status, "config_hash": config_hash(config),
                "macs": 1000 * config.trainer.steps, "steps": config.trainer.steps,
                "branches": [{"site": "fc1", "seed": 2, "blueprint": "mlp", "alpha": 1.0}],
                "metrics": {"final": {"test/accuracy": value, "validation/accuracy": value}},
            }  # fmt: skip
            (folder / "summary.json").write_text(json.dumps(summary))
            yield index, {"status": status, "error": "" if status == "FINISHED" else "it broke", "seconds": 0.1}


def sweep_of(folder: Path, arms: dict[str, list[str]], seeds: int, **compare: Any) -> Sweep:
    texts = [[f"arm={arm}", f"seed={seed}"] for arm in arms for seed in range(seeds)]
    layout = lay_out(texts, [])
    bare = {arm: compose(["tracking=none", *words]) for arm, words in arms.items()}
    jobs = []
    for job in layout.jobs:
        base = bare[job.arm]
        config = dataclasses.replace(base, seed=job.seed, compare=dataclasses.replace(base.compare, **compare))
        jobs.append(PreparedJob(job, config, {}, folder / str(job.number)))
    sweep = Sweep(layout, jobs, folder, [], Console(file=StringIO()))
    if len(layout.arms) > 1:
        sweep.plan = make_plan(sweep.compare, arms=arm_settings(jobs), seeds=layout.seeds, blocks=[""], metric="accuracy", direction="max")
        sweep.tuning_jobs = tuning_jobs(jobs, sweep.plan.tune_seeds, folder)
    return sweep


def go(sweep: Sweep, outcome: Outcome) -> InstantWorkers:
    workers = InstantWorkers(outcome)
    run_jobs(sweep, workers, MlflowProcess(sweep))  # type: ignore[arg-type]
    return workers


def good(config: RootConfig, folder: Path) -> tuple[float, str]:
    return 0.5, "FINISHED"


ACCURACY, BITS = {"loss": "min", "accuracy": "max"}, {"loss": "min", "bits": "min"}


def planned(folder: Path, told: dict[str, dict[str, str]], **compare: Any) -> str:
    """The metric and the direction in the plan of a sweep whose blocks are the tasks of ``told``, each with these metrics."""
    texts = [[f"grafting={arm}", f"task={task}", "seed=0"] for arm in ("linear", "drift") for task in told]
    layout = lay_out(texts, ["task"])
    base = compose(["tracking=none"])
    base = dataclasses.replace(base, compare=dataclasses.replace(base.compare, **compare))
    tasks = [dataclasses.replace(base.task, name=list(told)[job.number % len(told)]) for job in layout.jobs]
    configs = [dataclasses.replace(base, task=task) for task in tasks]
    jobs = [PreparedJob(job, config, {}, folder / "job") for job, config in zip(layout.jobs, configs, strict=True)]

    class Told(InstantWorkers):
        def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            directions = told[request["config"]["task"]["name"]]
            return {"primary": list(directions)[1], "directions": directions}

    plan = plan_sweep(Sweep(layout, jobs, folder, [], Console(file=StringIO())), Told(good))  # type: ignore[arg-type]
    assert plan is not None
    return f"{plan.metric} {plan.direction}"


def test_a_metric_that_a_task_has_not_is_refused_before_the_first_run(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"]}, 2, metric="beauty", direction="max")
    with pytest.raises(UserError, match=r"compare.metric=beauty is no metric of the task, which has loss or accuracy; .* compare.metric=…"):
        plan_sweep(sweep, InstantWorkers(good))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_where_the_spread_is_not_known_the_command_of_a_pilot_is_given_and_can_be_typed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"], "c": ["grafting=momentum"]}, 6)
    sweep = dataclasses.replace(sweep, command=["-m", "grafting=linear,drift,momentum", "seed=range(0,6)", "hydra.sweep.dir=x"])
    plan_sweep(sweep, InstantWorkers(good))  # type: ignore[arg-type]
    said = sweep.console.file.getvalue()  # type: ignore[attr-defined]
    command = "esper -m grafting=linear,drift,momentum 'seed=range(6,14)'"  # 8 pairs give the 15 differences that a pilot must have
    assert "compare.pilot=<the pilot's folder>/comparison.json" in said and f"  {command}\n" in said
    check_jobs(shlex.split(command)[2:], multirun=True)
    known = sweep_of(tmp_path / "known", {"a": [], "b": ["grafting=drift"]}, 6, spread=0.01)
    plan_sweep(dataclasses.replace(known, command=["-m"]), InstantWorkers(good))  # type: ignore[arg-type]
    assert "pilot" not in known.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_every_block_is_asked_for_the_metric_and_its_direction(tmp_path: Path) -> None:
    assert planned(tmp_path / "1", {"x": ACCURACY, "y": ACCURACY}) == "accuracy max"
    assert planned(tmp_path / "2", {"x": ACCURACY, "y": BITS}, metric="loss") == "loss min"
    with pytest.raises(UserError, match=r"compare.metric=bits is no metric of the task of x"):
        planned(tmp_path, {"y": BITS, "x": ACCURACY}, metric="bits", direction="min")
    with pytest.raises(UserError, match=r"accuracy, the primary metric of the first task, is no metric of the task of y"):
        planned(tmp_path, {"x": ACCURACY, "y": BITS})
    with pytest.raises(UserError, match="The direction of accuracy is max of x and min of y"):
        planned(tmp_path, {"x": ACCURACY, "y": {"loss": "min", "accuracy": "min"}}, direction="max")


def test_jobs_that_ask_for_two_plans_are_refused(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"]}, 1)
    sweep.jobs[1] = dataclasses.replace(sweep.jobs[1], config=dataclasses.replace(sweep.jobs[1].config, compare=CompareConfig(alpha=0.1)))
    with pytest.raises(UserError, match="b seed=0 sets the keys of compare otherwise than a seed=0"):
        plan_sweep(sweep, InstantWorkers(good))  # type: ignore[arg-type]


def test_a_store_that_cannot_be_is_refused_before_a_process_is_started_for_it(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"a": [], "b": []}, 1)
    sweep.jobs[0] = dataclasses.replace(
        sweep.jobs[0], config=dataclasses.replace(sweep.jobs[0].config, tracking=MlflowConfig(uri="foo://x"))
    )
    with pytest.raises(UserError, match=r"^tracking.uri=foo://x is of no kind that MLflow knows"), MlflowProcess(sweep):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_whose_jobs_a_sweeper_proposes_is_not_said_to_have_one_arm(tmp_path: Path) -> None:
    two = sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"]}, 1)
    sweep = dataclasses.replace(two, layout=dataclasses.replace(two.layout, arms=("",)), proposed=True)
    assert plan_sweep(sweep, InstantWorkers(good)) is None  # type: ignore[arg-type]
    said = sweep.console.file.getvalue()  # type: ignore[attr-defined]
    assert "proposes its jobs" in said and "One arm" not in said


def test_pairs_are_complete_early(tmp_path: Path) -> None:
    workers = go(sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"]}, 3), good)
    assert [config.seed for config in workers.ran] == [0, 0, 1, 1, 2, 2]


@pytest.mark.slow
def test_what_the_time_limit_leaves_out_is_said_judged_without_and_run_by_the_next_start(tmp_path: Path) -> None:
    arms = {"a": [], "b": ["grafting=drift"]}

    class Slow(InstantWorkers):
        """Every job is said to have lasted an hour, which no second pair has."""

        def run(self, requests: Iterable[dict[str, Any] | None], started: Any = None) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, answer in super().run(requests, started):
                yield index, answer | {"seconds": 3600.0}

    def start(minutes: float) -> Sweep:
        sweep = dataclasses.replace(sweep_of(tmp_path, arms, 3, figures=False), minutes=minutes)
        run_jobs(sweep, Slow(good), MlflowProcess(sweep))  # type: ignore[arg-type]
        return sweep

    first = start(1.0)
    said = " ".join(first.console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "The limit of 1 minutes left 4 jobs out, all those of a pair; go on with: esper hydra.sweep.dir=" in said
    comparison = judge_sweep(first)
    assert first.left == 4 and comparison is not None and comparison.verdicts[0].pairs == 1
    second = start(0.0)
    comparison = judge_sweep(second)
    assert second.left == 0 and comparison is not None and comparison.verdicts[0].pairs == 3


def test_finished_jobs_are_skipped_and_failed_ones_only_run_again_on_request(tmp_path: Path) -> None:
    arms = {"a": [], "b": ["grafting=drift"]}

    def second_fails(config: RootConfig, folder: Path) -> tuple[float, str]:
        return 0.5, "FAILED" if config.grafting.name == "drift" and config.seed == 1 else "FINISHED"

    sweep = sweep_of(tmp_path, arms, 2)
    assert len(go(sweep, second_fails).ran) == 4
    assert [one.job.label for one in sweep.failures] == ["b seed=1"]
    again = sweep_of(tmp_path, arms, 2)
    assert go(again, good).ran == []
    assert len(again.failures) == 1
    retry = dataclasses.replace(sweep_of(tmp_path, arms, 2), retry=True)
    assert len(go(retry, good).ran) == 1
    assert retry.failures == []


def test_a_job_whose_config_changed_is_run_again_and_what_was_there_is_kept_aside(tmp_path: Path) -> None:
    go(sweep_of(tmp_path, {"a": [], "b": []}, 1), good)
    assert len(go(sweep_of(tmp_path, {"a": ["trainer.steps=7"], "b": []}, 1), good).ran) == 1
    assert (tmp_path / "0.attempt1" / "summary.json").exists()


@pytest.mark.slow
def test_an_interrupted_job_keeps_its_folder_and_a_failed_one_does_not(tmp_path: Path) -> None:
    arms = {"a": [], "b": ["grafting=drift"]}
    sweep = sweep_of(tmp_path, arms, 1)
    go(sweep, lambda config, folder: (0.5, "FINISHED" if config.grafting.name == "drift" else "KILLED"))
    for one in sweep.jobs:  # a sweep that was stopped hears no answer
        (one.folder / "job.json").unlink()
    again = sweep_of(tmp_path, arms, 1)
    assert [config.grafting.name for config in go(again, good).ran] == ["linear"]
    assert "a seed=0 goes on from its newest checkpoint" in again.console.file.getvalue()  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    broken = tmp_path / "broken"
    go(sweep_of(broken, arms, 1), lambda config, folder: (0.5, "FAILED"))
    go(dataclasses.replace(sweep_of(broken, arms, 1), retry=True), good)
    assert sorted(path.name for path in broken.iterdir()) == ["0", "0.attempt1", "1", "1.attempt1"]


@pytest.mark.slow
def test_a_sequential_sweep_stops_at_the_look_that_decides(tmp_path: Path) -> None:
    def clear(config: RootConfig, folder: Path) -> tuple[float, str]:
        return (0.9 if config.grafting.name == "drift" else 0.5) + 0.001 * config.seed, "FINISHED"

    sweep = sweep_of(tmp_path, {"a": [], "b": ["grafting=drift"]}, 15, sequential=True)
    assert len(go(sweep, clear).ran) == 20
    assert len(go(sweep_of(tmp_path / "same", {"a": [], "b": []}, 15, sequential=True), good).ran) == 30


def test_the_final_net_starts_with_what_the_grown_run_kept_and_spends_its_macs(tmp_path: Path) -> None:
    arms = {"grown": ["trainer.steps=100"], "final": ["trainer.steps=300"], "equal": ["trainer.steps=300"]}
    sweep = sweep_of(tmp_path, arms, 1, final_of={"final": "grown", "equal": "grown"}, equal_macs={"equal": "grown/final"})
    ran = go(sweep, good).ran
    assert [config.trainer.steps for config in ran] == [100, 300, 100]
    germinate = {"at": "0%", "command": "germinate", "site": "fc1", "seeds": [2], "blueprint": "mlp"}
    assert [config.controller.name for config in ran] == ["heuristic", "scheduled", "scheduled"]
    assert ran[1].controller.script == [germinate]
    assert sweep.plan is not None
    assert sweep.plan.arms["final"] != sweep.plan.arms["equal"]


def test_a_job_that_depends_on_a_failed_one_is_counted_as_failed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"grown": [], "final": ["grafting=drift"]}, 1, final_of={"final": "grown"})
    go(sweep, lambda config, folder: (0.5, "FAILED"))
    assert [one.job.arm for one in sweep.failures] == ["grown", "final"]
    assert "depends on arm grown" in sweep.jobs[1].error


def test_arms_that_wait_for_each_other_or_for_nobody_are_refused() -> None:
    compare = compose(["tracking=none"]).compare
    with pytest.raises(UserError, match="wait for each other"):
        run_order(["a", "b"], dataclasses.replace(compare, final_of={"a": "b", "b": "a"}))
    with pytest.raises(UserError, match="names the arm 'c'"):
        run_order(["a", "b"], dataclasses.replace(compare, final_of={"a": "c"}))
    with pytest.raises(UserError, match="write a/b"):
        run_order(["a", "b"], dataclasses.replace(compare, equal_macs={"a": "b"}))


def test_fresh_seeds_change_the_run_and_not_the_pair(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"a": [], "again": []}, 2, fresh_seeds={"again": 1000})
    assert [config.seed for config in go(sweep, good).ran] == [0, 1000, 1, 1001]
    assert sweep.jobs[-1].job.seed == 1


ARMS = {"a": [], "b": ["grafting=drift"]}


def likes(config: RootConfig, folder: Path) -> tuple[float, str]:
    """One arm likes a learning rate of 0.1, the other 0.01; nobody survives 1e30."""
    best = 0.01 if config.grafting.name == "drift" else 0.1
    return 1.0 - abs(config.optimizer.lr - best), "FAILED" if config.optimizer.lr > 1e29 else "FINISHED"


@pytest.mark.slow
def test_every_arm_is_tuned_on_validation_with_seeds_of_its_own(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ARMS, 2, tune={"optimizer.lr": [0.1, 0.01]}, tune_seeds=3)
    ran = go(sweep, likes).ran
    tuning, compared = [c for c in ran if c.seed >= 1_000_000], [c for c in ran if c.seed < 1_000_000]
    assert len(tuning) == 2 * 2 * 3
    assert {(c.grafting.name, c.optimizer.lr) for c in compared} == {("linear", 0.1), ("drift", 0.01)}
    assert go(sweep_of(tmp_path, ARMS, 2, tune={"optimizer.lr": [0.1, 0.01]}, tune_seeds=3), likes).ran == []


def test_what_tuning_chose_and_cost_is_kept_and_its_failures_are_said_and_counted(tmp_path: Path) -> None:
    grid = {"optimizer.lr": [1e30, 0.1, 0.01]}
    sweep = sweep_of(tmp_path, {"a": ["trainer.steps=50"], "b": ["trainer.steps=50", "grafting=drift"]}, 1, tune=grid, tune_seeds=2)
    go(sweep, likes)
    found = sweep.tuned[("b", "")]
    assert (found.values, found.runs, found.failed, found.macs) == ({"optimizer.lr": 0.01}, 6, 2, 6 * 50_000)
    assert [(one.runs, one.failed) for one in found.tried] == [(2, 2), (2, 0), (2, 0)]
    assert found.tried[2] == TuningCandidate({"optimizer.lr": 0.01}, 1.0, 2, 0)
    assert parse_tuning(tuning_text(sweep.tuned.values()))[1].tried[1:] == found.tried[1:]
    said = " ".join(sweep.console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "failed tuning b optimizer.lr=1e+30 seed=1000001: it broke" in said
    assert "tuned b: optimizer.lr=0.01, validation accuracy 1 (6 runs, 2 failed, 3e+05 MACs)" in said
    assert [one.job.label for one in sweep.failures][:2] == [f"tuning a optimizer.lr=1e+30 seed={s}" for s in (1_000_000, 1_000_001)]
    comparison = judge_sweep(sweep)
    assert comparison is not None and comparison.tuned == list(sweep.tuned.values())
    assert any("2 of 6 tuning runs of b failed (optimizer.lr=1e+30 2 of 2)" in line for line in comparison.notes)
    show(comparison, sweep.plan, sweep.console)  # type: ignore[arg-type]
    assert "tuned on validation" in sweep.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_parent_runs_metrics_have_names_that_mlflow_takes(tmp_path: Path) -> None:
    arms = {"optimizer.lr=1 sites=[fc1]": [], "optimizer.lr=2 sites=[fc1]": ["grafting=drift"]}
    sweep = sweep_of(tmp_path, arms, 1, tune={"optimizer.lr": [0.1]}, tune_seeds=1, figures=False)
    go(sweep, good)
    comparison = judge_sweep(sweep)
    assert comparison is not None and sweep.plan is not None
    numbers = page.verdict_metrics(comparison, sweep.plan)
    assert numbers["arm/optimizer.lr_1 sites__fc1_/accuracy"] == numbers["tuning/optimizer.lr_2 sites__fc1_/validation"] == 0.5
    assert numbers["0_main/optimizer.lr_2 sites__fc1_ pairs"] == 1.0
    assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in numbers)


@pytest.mark.slow
def test_tuning_that_failed_runs_again_on_request_only_and_one_combination_must_survive(tmp_path: Path) -> None:
    given = {"tune": {"optimizer.lr": [0.1, 1e30]}, "tune_seeds": 1}
    go(sweep_of(tmp_path, ARMS, 1, **given), likes)
    again = sweep_of(tmp_path, ARMS, 1, **given)
    assert go(again, likes).ran == [] and len(again.failures) == 2
    retry = dataclasses.replace(sweep_of(tmp_path, ARMS, 1, **given), retry=True)
    assert [config.optimizer.lr for config in go(retry, likes).ran] == [1e30, 1e30]
    with pytest.raises(UserError, match="Tuning arm 'a': every combination has a run that failed"):
        go(sweep_of(tmp_path / "none", ARMS, 1, tune={"optimizer.lr": [1e30]}), likes)


@pytest.mark.slow
def test_what_the_arms_differ_in_is_not_tuned(tmp_path: Path) -> None:
    sentence = "compare.tune.optimizer.lr is not accepted, because the arms differ in optimizer.lr [(]a has 0.001, b has 0.01[)]"
    with pytest.raises(UserError, match=sentence):
        sweep_of(tmp_path, {"a": ["optimizer.lr=0.001"], "b": ["optimizer.lr=0.01"]}, 1, tune={"optimizer.lr": [0.003]})
    with pytest.raises(UserError, match="a has none, b has"):
        sweep_of(tmp_path, ARMS, 1, tune={"grafting.threshold": [0.2]})


def test_an_arm_that_depends_on_another_is_tuned_on_runs_of_the_values_that_one_chose(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ARMS, 1, final_of={"b": "a"}, tune={"optimizer.lr": [0.1, 0.01]}, tune_seeds=2)

    def breaks(config: RootConfig, folder: Path) -> tuple[float, str]:
        broken = (config.grafting.name, config.optimizer.lr, config.seed) == ("linear", 0.1, 1_000_001)
        return 0.5, "FAILED" if broken else "FINISHED"

    go(sweep, breaks)
    assert [sweep.tuned[(arm, "")].failed for arm in ARMS] == [1, 0]
    assert sweep.finished("a", "", 1_000_001)["status"] == "FINISHED"


def test_a_tuned_key_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no key optimizer"):
        sweep_of(tmp_path, ARMS, 1, tune={"optimizer.rate": [1]})
    with pytest.raises(UserError, match="give a list"):
        sweep_of(tmp_path, ARMS, 1, tune={"optimizer.lr": 1})
