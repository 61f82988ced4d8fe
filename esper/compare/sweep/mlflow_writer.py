"""``python -m esper.compare.sweep.mlflow_writer``: the one process that writes a sweep to the MLflow store.

Jobs send the frames of ``esper.tracking.remote`` over a Unix socket, a connection a run; the sweep itself asks over
standard input, a JSON line a request. Every access to the store happens under one lock, so that jobs that run at the
same time never meet a locked database.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from esper.compare.results.mlflow_sweep import ARM, BLOCK, JOB_ERROR, KIND, SEED, SWEEP, cost_values, plan_tags
from esper.errors import UserError
from esper.tracking import remote
from esper.tracking.mlflow_run import LONGEST_TAG, NAMES, MlflowRun, fitted, legal
from esper.tracking.mlflow_store import experiment_id, living_run, quiet_client
from esper.tracking.run_info import flatten

SHOWN = 10  # characters of a name that MLflow's parallel coordinates show
LONGEST = 250  # characters of a setting that is worth an axis


def axis_labels(arms: Sequence[str]) -> dict[str, str]:
    """The arms' names, or, where these begin alike, their values alone; numbered where nothing else keeps them apart."""
    values = [re.sub(r"(^| )[^ =]+=", r"\1", arm) for arm in arms]
    for names in (list(arms), values):
        if len({name[:SHOWN] for name in names}) == len(arms):
            return dict(zip(arms, names, strict=True))
    return {arm: f"{number} {value}" for number, (arm, value) in enumerate(zip(arms, values, strict=True), 1)}


class SweepWriter:
    """The parent run and the children of one sweep."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        self.lock = threading.Lock()
        self.jobs: dict[str, dict[str, str]] = opening["jobs"]
        self.labels = axis_labels(opening.get("arms") or list(dict.fromkeys(tags[ARM] for tags in self.jobs.values() if tags.get(ARM))))
        arms = json.loads(opening["plan"])["arms"] if opening["plan"] else {}
        self.differing = sorted(set.intersection(*map(set, arms.values()))) if arms else []  # an axis needs a value of every arm
        self.uri: str = opening["uri"]
        self.client = quiet_client(self.uri)
        self.experiment = experiment_id(self.client, self.uri, opening["experiment"])
        self.opened: dict[str, str] = {}  # MLflow run by the job's folder
        self.broken: set[str] = set()  # folders of jobs that failed
        self.parent: str = opening["parent"] or self._create_parent(opening)
        self.attached: bool = opening.get("attached", False)  # the sweep's own process has begun the parent run, and will end it
        if not self.attached:
            self._begin()
            self._note({}, plan_tags(opening["plan"]))

    def _begin(self) -> None:
        """Mark the parent run RUNNING, also one that ended before.

        Raises:
            UserError: it was deleted, in MLflow's pages or for good.
        """
        living_run(self.client, self.uri, self.parent, "The sweep's", "or begin anew in another folder: hydra.sweep.dir=…")
        self.client.update_run(self.parent, status="RUNNING")

    def _note(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Metrics and tags of the parent run, as many in a call as MLflow takes: every call waits for the disk."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        numbers = [Metric(name, value, now, 0) for name, value in metrics.items()]
        texts = [RunTag(name, fitted(value, LONGEST_TAG)) for name, value in tags.items()]
        for start in range(0, max(len(numbers), len(texts)), NAMES):
            self.client.log_batch(self.parent, metrics=numbers[start : start + NAMES], tags=texts[start : start + NAMES])

    def _create_parent(self, opening: Mapping[str, Any]) -> str:
        tags = {KIND: "sweep", SWEEP: opening["sweep"], "esper.folder": opening["folder"]}
        started = int(time.time() * 1000)
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=opening["name"])
        return str(run.info.run_id)

    def tags(self, folder: str) -> dict[str, str]:
        """The tags by which MLflow's pages group a job's run."""
        return self.jobs.get(str(Path(folder).resolve()), {})

    def child(self, frame: remote.Open) -> MlflowRun:
        """Open the MLflow run of a job below the sweep's."""
        tags = self.tags(frame.info.folder)
        record = msgspec.structs.replace(
            frame.info,
            parent=self.parent,
            name=tags.get("name", frame.info.name),
            tags=dict(frame.info.tags) | {key: value for key, value in tags.items() if key != "name"},
        )
        run = MlflowRun(dataclasses.replace(frame.config, uri=self.uri))
        run.open(record)
        self.opened[str(Path(record.folder).resolve())] = run.run_id
        self._describe(run.run_id, tags, frame.info.config)
        return run

    def _describe(self, run_id: str, tags: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Parameters that make readable axes in parallel coordinates: the arm, and the settings in which arms differ, defaults included.

        A run's own parameters leave out defaults, which MLflow would show as unknown.
        """
        from mlflow.entities import Param

        known, flat = self.client.get_run(run_id).data.params, flatten(config)
        shown = {"arm": self.labels.get(tags.get(ARM, ""), ""), "block": tags.get(BLOCK, ""), "seed": tags.get(SEED, "")}
        shown |= {legal(key): str(flat[key]) for key in self.differing if key in flat}
        new = [Param(name, value) for name, value in shown.items() if value and len(value) <= LONGEST and name not in known]
        for start in range(0, len(new), NAMES):
            self.client.log_batch(run_id, params=new[start : start + NAMES])

    def add(self, request: Mapping[str, Any]) -> None:
        """Take in a job of a search, which proposes its jobs on the way."""
        self.jobs[request["folder"]] = request["tags"]

    def failed(self, request: Mapping[str, Any]) -> None:
        """Mark the run of a job that failed; a job that never opened one gets one."""
        folder = str(Path(request["folder"]).resolve())
        self.broken.add(folder)
        known = self.opened.get(folder) or self._opened_elsewhere(folder) or self._create_failed(folder)
        self.client.set_tag(known, JOB_ERROR, fitted(request["error"], LONGEST_TAG))
        self.client.set_terminated(known, "FAILED")

    def _opened_elsewhere(self, folder: str) -> str:
        """The newest run of this job that a process on another machine has opened; empty if none has."""
        quoted = folder.replace("'", "\\'")
        found = self.client.search_runs(
            [self.experiment],
            f"tags.`mlflow.parentRunId` = '{self.parent}' and tags.`esper.folder` = '{quoted}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return found[0].info.run_id if found else ""

    def _create_failed(self, folder: str) -> str:
        tags = dict(self.tags(folder)) | {"mlflow.parentRunId": self.parent, "esper.folder": folder}
        name = tags.pop("name", Path(folder).name)
        return str(self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id)

    def lost(self, folder: str) -> str:
        """The status of a run whose job went away without closing it: its process broke, or the sweep was stopped."""
        return "FAILED" if folder in self.broken else "KILLED"

    def close(self, request: Mapping[str, Any]) -> None:
        """Log the comparison's files and numbers, and end the parent run even if that fails; no child is left RUNNING."""
        status = "FAILED"
        try:
            for path in request["artifacts"]:
                self.client.log_artifact(self.parent, path, "figures" if path.endswith(".png") else None)
            self._note(request["metrics"], request["tags"])
            status = request["status"]
        finally:
            running = f"tags.`mlflow.parentRunId` = '{self.parent}' and attributes.status = 'RUNNING'"
            for run in self.client.search_runs([self.experiment], running):
                self.client.set_terminated(run.info.run_id, "KILLED")
            self.client.set_terminated(self.parent, status)


def end(run: MlflowRun, status: str, summary: Mapping[str, Any]) -> None:
    """Close a job's run. An interrupted one is resumed later, so its figures and model are left out: the user waits for this end."""
    if status == "KILLED":
        run.config = dataclasses.replace(run.config, figures=False, model=False)
    run.close(status, summary)


def serve_run(writer: SweepWriter, stream: BinaryIO) -> None:
    """One job's frames until it closes; a job that goes away before is marked KILLED, or FAILED where the sweep says so."""
    run: MlflowRun | None = None
    folder = ""
    try:
        while True:
            frame = remote.read_frame(stream)
            with writer.lock:
                match frame:
                    case remote.Open():
                        run, folder = writer.child(frame), str(Path(frame.info.folder).resolve())
                    case remote.Messages():
                        assert run is not None
                        run.record(frame.messages)
                    case remote.Flush():
                        assert run is not None
                        run.flush()
                    case remote.Close():
                        assert run is not None
                        ending, run = run, None
                        ending.record([cost_values(frame.summary)])
                        end(ending, frame.status, frame.summary)
            if not isinstance(frame, remote.Messages):
                remote.write_frame(stream, remote.Reply())
            if isinstance(frame, remote.Close):
                return
    except (EOFError, ConnectionError):
        if run is not None:
            with writer.lock:
                end(run, writer.lost(folder), {})
    except UserError as error:
        remote.write_frame(stream, remote.Reply(str(error), refused=True))
        if run is not None:
            with writer.lock:
                end(run, "FAILED", {})
    except Exception as error:  # told to the job, which raises it at the end of its run
        traceback.print_exc()
        remote.write_frame(stream, remote.Reply(f"{type(error).__name__}: {error}"))
        if run is not None:
            with writer.lock:
                end(run, "FAILED", {})


def listen(writer: SweepWriter, server: socket.socket) -> None:
    """Serve every job in its own thread, until the process ends."""

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            serve_run(writer, cast(BinaryIO, stream))  # a socket's file is one in all but name

    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def main() -> int:
    """``main(path)``: serve the sweep until its close, or until its end without one, which is recorded as KILLED."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of libraries goes to the log
    server = socket.socket(socket.AF_UNIX)
    Path(sys.argv[1]).unlink(missing_ok=True)  # of one that was killed
    server.bind(sys.argv[1])
    server.listen(64)
    writer: SweepWriter | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["ask"] == "prepare":
                quiet_client(request["uri"])  # imports MLflow and makes a new store, while the sweep makes its plan
            elif request["ask"] == "open":
                writer = SweepWriter(request)
                threading.Thread(target=listen, args=(writer, server), daemon=True).start()
            else:
                assert writer is not None
                with writer.lock:
                    {"add": writer.add, "failed": writer.failed, "close": writer.close}[request["ask"]](request)
            answers.write(json.dumps({"parent": writer.parent if writer else ""}) + "\n")
        except UserError as error:
            answers.write(json.dumps({"refused": str(error)}) + "\n")
        except Exception as error:  # told to the sweep, which says it to the user
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0][:200]  # the log has the rest
            answers.write(json.dumps({"error": f"{type(error).__name__}: {first}"}) + "\n")
        if request["ask"] == "close":
            return 0
    if writer is not None and not writer.attached:
        with writer.lock:
            writer.client.set_terminated(writer.parent, "KILLED")
    return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # everything is in the store: the sweep need not wait until what was imported has been taken apart
