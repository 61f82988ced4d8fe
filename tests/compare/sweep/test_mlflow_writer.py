"""The process that writes a sweep to the store: how a run ends whose job has gone without a word."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.compare.results.mlflow_sweep import ARM, SEED
from esper.compare.sweep.mlflow_process import MlflowProcess
from esper.compare.sweep.mlflow_writer import SweepWriter, axis_labels, serve_run
from esper.errors import UserError
from esper.tracking import MlflowConfig, RunInfo, remote

pytestmark = pytest.mark.usefixtures("heavy_libraries")


@pytest.mark.parametrize(("said", "status"), [("before", "FAILED"), ("after", "FAILED"), ("never", "KILLED")])
def test_a_job_that_broke_has_failed_and_one_that_was_interrupted_was_killed(said: str, status: str, tmp_path: Path) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    opening: dict[str, Any] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "esper", "parent": "", "name": "a sweep"}
    writer = SweepWriter({**opening, "sweep": "s", "folder": str(tmp_path), "plan": "", "jobs": {str(folder): {"arm": "a", "seed": "0"}}})
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rwb") as end:
        serving = threading.Thread(target=serve_run, args=(writer, end))
        serving.start()
        with ours, ours.makefile("rwb") as stream:
            record = RunInfo(run="0", name="a", folder=str(folder), outputs=str(tmp_path), started_ms=int(time.time() * 1000))
            remote.write_frame(stream, remote.Open(MlflowConfig(figures=False, model=False, system_s=0.0), record))
            assert remote.read_reply(stream).error == ""
            if said == "before":
                writer.failed({"folder": str(folder), "error": "the worker process was killed"})
        serving.join(60)
    if said == "after":
        writer.failed({"folder": str(folder), "error": "the worker process was killed"})
    run = writer.client.get_run(writer.opened[str(folder)])
    assert run.info.status == status
    assert run.data.tags.get("esper.error") == (None if said == "never" else "the worker process was killed")
    assert len(writer.client.search_runs([writer.experiment])) == 2, "the parent and this one"


@pytest.mark.usefixtures("processes")
def test_a_sweep_whose_parent_run_was_deleted_says_how_to_go_on(tmp_path: Path) -> None:
    opening: dict[str, Any] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "esper", "parent": "", "name": "a sweep"}
    opening |= {"ask": "open", "sweep": "s", "folder": str(tmp_path), "plan": "", "jobs": {}}
    writer, never = SweepWriter(opening), "0" * 32
    with pytest.raises(UserError, match=rf"run {never} is no longer in sqlite:.*hydra\.sweep\.dir="):
        SweepWriter(opening | {"parent": never})
    writer.client.delete_run(writer.parent)
    command = [sys.executable, "-m", "esper.compare.sweep.mlflow_writer", str(tmp_path / "w")]
    request = json.dumps(opening | {"parent": writer.parent}) + "\n"
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)["refused"]
    assert f"mlflow runs restore --run-id {writer.parent}" in answer and "hydra.sweep.dir=" in answer and "Mlflow" not in answer
    asked: Any = MlflowProcess.__new__(MlflowProcess)
    asked._process = SimpleNamespace(stdin=StringIO(), stdout=StringIO(done.stdout))
    with pytest.raises(UserError) as refused:
        asked._ask({})
    assert str(refused.value) == answer, "as it is, without what the process calls it"


@pytest.mark.parametrize(
    ("arms", "shown"),
    [
        (["grown", "scratch", "scratch_macs", "random_places"], ["grown", "scratch", "scratch_ma", "random_pla"]),
        (["optimizer.lr=0.001 grafting=linear", "optimizer.lr=0.001 grafting=drift"], ["0.001 line", "0.001 drif"]),
        (["grad_norm_narrow", "grad_norm_wide"], ["1 grad_nor", "2 grad_nor"]),
        (["default", "a=[1,2] b=x=y"], ["default", "a=[1,2] b="]),
    ],
)
def test_arms_can_be_told_apart_by_the_ten_letters_that_parallel_coordinates_show(arms: list[str], shown: list[str]) -> None:
    assert [label[:10] for label in axis_labels(arms).values()] == shown and list(axis_labels(arms)) == arms


def test_a_run_has_what_the_arms_differ_in_as_parameters_also_where_it_is_the_default(tmp_path: Path) -> None:
    both = {"controller.script": [], "optimizer.lr": 0.003}
    plan = json.dumps({"arms": {"a": {**both, "grafting.max_hold": 2.0}, "b": both}})
    opening: dict[str, Any] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "esper", "parent": "", "name": "a sweep"}
    writer = SweepWriter(opening | {"sweep": "s", "folder": str(tmp_path), "plan": plan, "jobs": {str(tmp_path): {ARM: "a"}}})
    run = writer.client.create_run(writer.experiment).info.run_id
    config = {"seed": 3, "optimizer": {"lr": 0.003, "name": "adamw"}, "controller": {"script": ["x" * 300]}, "grafting": {"max_hold": 2.0}}
    for _ in range(2):  # a run that goes on is described again
        writer._describe(run, {ARM: "a", SEED: "3"}, config)
    assert writer.client.get_run(run).data.params == {"arm": "a", "seed": "3", "optimizer.lr": "0.003"}
