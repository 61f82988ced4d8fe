"""Searches as a person starts them: real workers, a real store, a process that is really killed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.report.summary_file import read_summary
from tests.here import here

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("processes")]
SPACE = ("optimizer.lr=tag(log,interval(1e-4,0.1))", "model.width=range(16,33,16)", "grafting=linear,drift")
SEARCH = ("-m", "hydra/sweeper=optuna", *SPACE, "trainer.validate_every=10%", "trainer.save=false", "hydra.sweeper.startup=3")
ONE = ("tracking=csv", "hydra.launcher.workers=1", "hydra.sweeper.prune_trials=1", "hydra.sweeper.n_trials=6")
STEPS = "trainer.steps=150"


def searched(*words: str) -> str:
    done = here(*SEARCH, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def until(happened: object, process: subprocess.Popen[str]) -> None:
    assert callable(happened)
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def test_killed_in_the_middle_and_started_again_it_ends_as_an_undisturbed_one(tmp_path: Path, checkout: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    searched(*ONE, STEPS, f"hydra.sweep.dir={whole}", "compare.figures=false")
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", *SEARCH, *ONE, STEPS, f"hydra.sweep.dir={cut}", "trainer.checkpoint_every=5%"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(checkout)},
    )  # fmt: skip
    until(lambda: [*cut.glob("2-*/metrics.csv")], process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    said = searched(*ONE, STEPS, f"hydra.sweep.dir={cut}", "trainer.checkpoint_every=5%", "compare.figures=false")
    assert "Going on with the search in" in said
    assert not re.search(r"trial [01] ", said.split("the best trials")[0]), "what had ended does not run again"
    found, undisturbed = trials(cut), trials(whole)
    assert found == undisturbed
    assert [one["trial"] for one in found] == [str(number) for number in range(6)], "no trial is counted twice"
    assert {one["state"] for one in found} == {"finished", "pruned"}
    pruned = next(one for one in found if one["state"] == "pruned")
    (folder,) = cut.glob(f"{pruned['trial']}-*")
    assert 0 < read_summary(folder)["steps"] < 150 and "fallen behind earlier trials" in (folder / "job.log").read_text()
    again = searched(*ONE, STEPS, f"hydra.sweep.dir={cut}", "compare.figures=false").split("the best trials")[0]
    assert not re.search(r"^\d+/\d+ ", again, re.MULTILINE), "nothing runs once more"


def test_in_parallel_it_ends_in_the_same_report_and_store(tmp_path: Path, heavy_libraries: None) -> None:
    from esper.tracking.mlflow_store import quiet_client

    parallel = ("hydra.launcher.workers=2", "hydra.sweeper.n_trials=4", "hydra.sweeper.objectives=[quality,parameters,macs]", "seed=0,1")
    said = searched(*parallel, "trainer.steps=20", f"output={tmp_path}", f"hydra.sweep.dir={tmp_path}/search")
    assert "4 trials: 4 finished." in said and "No trial is better in everything (quality, parameters, macs)" in said
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    rows = trials(tmp_path / "search")
    assert [one["trial"] for one in rows] == ["0", "1", "2", "3"] and len({one["optimizer.lr"] for one in rows}) == 4
    for one in rows:
        folders = [next((tmp_path / "search").glob(f"{2 * int(one['trial']) + seed}-*")) for seed in (0, 1)]
        values = [read_summary(folder)["metrics"]["final"]["validation/accuracy"] for folder in folders]
        assert float(one["quality"]) == pytest.approx(sum(values) / 2), "a trial is worth the mean over its seeds"
    beaten = [a for a in rows if any(all(better(b, a)) and a is not b for b in rows)]
    assert found["front"] == [int(one["trial"]) for one in rows if one not in beaten]
    client = quiet_client(f"sqlite:///{tmp_path}/mlflow.db")
    parent = client.get_run(json.loads((tmp_path / "search" / "sweep.json").read_text())["parent"])
    assert parent.info.status == "FINISHED" and "4 trials" in parent.data.tags["mlflow.note.content"]
    assert parent.data.metrics["best/accuracy"] == max(float(one["quality"]) for one in rows)
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"search.json", "search.txt", "trials.csv", "figures"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "figures")} == {"figures/front.png", "figures/history.png"}
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 8 and {run.data.tags["esper.kind"] for run in children} == {"trial"}
    assert {run.info.status for run in children} == {"FINISHED"}


def test_its_trials_run_elsewhere_where_none_is_ended_early(tmp_path: Path, processes: None) -> None:
    elsewhere = ("hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.workers=2", "hydra.sweeper.pruner=none")
    said = searched(*elsewhere, "hydra.sweeper.n_trials=2", "trainer.steps=20", f"hydra.sweep.dir={tmp_path}/search", "tracking=csv")
    assert "2 trials: 2 finished." in said
    for number, one in enumerate(trials(tmp_path / "search")):
        (folder,) = (tmp_path / "search").glob(f"{number}-*")
        summary = read_summary(folder)
        assert summary["steps"] == 20 and float(one["quality"]) == summary["metrics"]["final"]["validation/accuracy"]
    assert len([*(tmp_path / "search" / "submitit").glob("*_begun")]) == 2, "each was a job of submitit's"


def better(one: dict[str, str], other: dict[str, str]) -> list[bool]:
    """Whether one trial is at least as good as the other in quality, parameters and MACs, and not equal."""
    signs = {"quality": 1, "parameters": -1, "macs": -1}
    pairs = [(sign * float(one[key]), sign * float(other[key])) for key, sign in signs.items()]
    return [*(a >= b for a, b in pairs), any(a > b for a, b in pairs)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optimizer.lr=interval(0.1,0.2)"], "add hydra/sweeper=optuna to search in it"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trials=0", "seed=0,1"], "hydra.sweeper.n_trials=0 is not accepted"),
        (["hydra/sweeper=optuna", "hydra.sweeper.objectives=[beauty]", "optimizer.lr=0.1,0.2"], "there are quality, parameters and macs"),
        (["hydra/sweeper=optuna", "optimizer.lr=interval(-1,1)"], "optimizer.lr=-1.0 is not accepted"),
        (["hydra/sweeper=optuna", "hydra/launcher=basic", "optimizer.lr=0.1,0.2"], "leave the other launcher out"),
        (["hydra/sweeper=optuna", "hydra/launcher=submitit", "optimizer.lr=0.1,0.2"], "add hydra.sweeper.pruner=none to train every trial"),
        (["hydra/sweeper=optuna", "seed=0,1"], "Nothing to search"),
        (["hydra/sweeper=optuna", "experiment=controls"], "leave it out, as in arm=grown,host,all_on,random_places,naive"),
        (["hydra/sweeper=optuna", "optimizer.lr=0.1,0.2", "hydra.sweeper.metric=beauty"], "beauty is no metric"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_its_first_trial(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("-m", *words, "tracking=csv")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not [*tmp_path.rglob("summary.json")]
