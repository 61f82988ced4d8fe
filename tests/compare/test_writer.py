"""The process that writes a sweep to the store: how a run ends whose job has gone without a word."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esper.compare.writer import Writer, serve_run
from esper.tracking import MlflowConfig, RunRecord, frames


@pytest.mark.parametrize(("said", "status"), [("before", "FAILED"), ("after", "FAILED"), ("never", "KILLED")])
def test_a_job_that_broke_has_failed_and_one_that_was_interrupted_was_killed(said: str, status: str, tmp_path: Path) -> None:
    folder = tmp_path / "0"
    folder.mkdir()
    opening: dict[str, Any] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "esper", "parent": "", "name": "a sweep"}
    writer = Writer({**opening, "sweep": "s", "folder": str(tmp_path), "plan": "", "jobs": {str(folder): {"arm": "a", "seed": "0"}}})
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("rwb") as end:
        serving = threading.Thread(target=serve_run, args=(writer, end))
        serving.start()
        with ours, ours.makefile("rwb") as stream:
            record = RunRecord(run="0", name="a", folder=str(folder), outputs=str(tmp_path), started_ms=int(time.time() * 1000))
            frames.write(stream, frames.Open(MlflowConfig(figures=False, model=False, system_s=0.0), record))
            assert frames.read(stream, frames.Reply).error == ""
            if said == "before":
                writer.failed({"folder": str(folder), "error": "the worker process was killed"})
        serving.join(60)
    if said == "after":
        writer.failed({"folder": str(folder), "error": "the worker process was killed"})
    run = writer.client.get_run(writer.opened[str(folder)])
    assert run.info.status == status
    assert run.data.tags.get("esper.error") == (None if said == "never" else "the worker process was killed")
    assert len(writer.client.search_runs([writer.experiment])) == 2, "the parent and this one"
