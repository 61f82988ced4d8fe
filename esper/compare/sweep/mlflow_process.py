"""The sweep's side of the process that writes to MLflow: starting it, asking it, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import esper
from esper.compare.results.comparison import tuning_text
from esper.compare.results.mlflow_sweep import ARM, BLOCK, KIND, SEED, SWEEP, TRIAL, TUNED, TUNING, split_text
from esper.compare.results.plan import saved_text
from esper.compare.sweep.sweep import PreparedJob, Sweep, TrialJob, TuningJob
from esper.compare.sweep.worker_pool import interrupted_by_user
from esper.errors import UserError
from esper.tracking.config import MlflowConfig, mlflow_in, tracking_uri
from esper.tracking.mlflow_store import check_store
from esper.tracking.remote import SOCKET

LOG = "tracker.log"
STOP_S = 30.0  # how long its process may take to end once everything is written
CLOSE_S = 4.0  # how long ending the sweep's runs in the store may take after Ctrl-C


class MlflowProcess:
    """The MLflow process of a sweep; does nothing where ``tracking`` is not MLflow.

    Use as a context: leaving it ends the parent run with ``status``, so that none stays RUNNING.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.status = "FAILED"
        self.files: list[Path] = []
        self.metrics: dict[str, float] = {}
        self.tags: dict[str, str] = {}
        self._config: MlflowConfig | None = mlflow_in(sweep.jobs[0].config.tracking)
        self._process: subprocess.Popen[str] | None = None
        self._opened = False
        self.environment: dict[str, str] = {}

    def __enter__(self) -> MlflowProcess:
        if self._config is None:
            return self
        check_store(self._config, self.sweep.jobs[0].config.output)
        self._home = tempfile.TemporaryDirectory(prefix="esper-")
        path = str(Path(self._home.name) / "store")  # short: a socket's path has 107 characters
        self.environment = {SOCKET: path}
        self._process = self._start(path)
        return self

    def _start(self, path: str) -> subprocess.Popen[str]:
        assert self._config is not None
        root = str(Path(esper.__file__).resolve().parents[1])
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        with (self.sweep.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "esper.compare.sweep.mlflow_writer", path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        _send(process, {"ask": "prepare", "uri": tracking_uri(self._config, self.sweep.jobs[0].config.output)})  # open has the answer
        return process

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is None:
            return
        try:
            if self._opened:
                with self._in_time(kind):
                    self._close()
        except UserError:
            self._end_parent()
            if kind is None:
                raise
        finally:
            self._stop(self._process, 0.0 if interrupted_by_user(kind) else STOP_S)
            self._home.cleanup()

    @contextlib.contextmanager
    def _in_time(self, kind: type[BaseException] | None) -> Iterator[None]:
        """After Ctrl-C the process is killed if it takes long; the sweep writes the rest when it is resumed."""
        if not interrupted_by_user(kind):
            yield
            return
        assert self._process is not None
        timer = threading.Timer(CLOSE_S, self._process.kill)
        timer.start()
        try:
            yield
        except UserError as error:
            print(f"esper: MLflow may show runs of this sweep as RUNNING until it goes on. {error}", file=sys.stderr)
        finally:
            timer.cancel()

    def _end_parent(self) -> None:
        """A new process ends the parent run that a killed one has left RUNNING."""
        assert self._process is not None
        self._stop(self._process, STOP_S)
        self._process = self._start(self.environment[SOCKET])
        self.status, self.files, self.metrics, self.tags = "FAILED", [], {}, {}
        self.open()
        self._close()

    def _stop(self, process: subprocess.Popen[str], seconds: float) -> None:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed with a request unread
            process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def open(self) -> None:
        """Make or continue the parent run, with the plan on it, before the first job."""
        if self._process is None or self._config is None:
            return
        self._answer()  # to what it was asked when it began
        jobs = (*self.sweep.jobs, *self.sweep.tuning_jobs)
        answer = self._ask(self._opening() | {"jobs": {str(one.folder.resolve()): self._tags(one) for one in jobs}})
        self.sweep.parent, self._opened = answer["parent"], True

    def _opening(self) -> dict[str, Any]:
        sweep, settings = self.sweep, self._config
        assert settings is not None, "nothing is asked of a writer that is not there"
        return {
            "ask": "open",
            "uri": tracking_uri(settings, sweep.jobs[0].config.output),
            "experiment": settings.experiment,
            "parent": sweep.parent,
            "sweep": sweep.id,
            "name": sweep.name,
            "folder": str(sweep.folder.resolve()),
            "plan": saved_text(sweep.folder) if sweep.plan else "",
        }

    def opening(self, one: PreparedJob) -> dict[str, Any]:
        """What a process on another machine needs to write this job's run below the sweep's; empty where nothing is written."""
        if self._process is None:
            return {}
        arms = list(dict.fromkeys(each.job.arm for each in self.sweep.jobs if each.job.arm))
        return self._opening() | {"attached": True, "arms": arms, "jobs": {str(one.folder.resolve()): self._tags(one)}}

    def _tags(self, one: PreparedJob) -> dict[str, str]:
        job = one.job
        kind = {KIND: TUNING} if isinstance(job, TuningJob) else {KIND: TRIAL} if isinstance(job, TrialJob) else {}
        return kind | {"name": job.label, SWEEP: self.sweep.id, ARM: job.arm, BLOCK: job.block, SEED: str(job.seed)}

    def add(self, one: PreparedJob) -> None:
        """Name a job that was not there at the beginning, before it runs."""
        if self._process is not None:
            self._ask({"ask": "add", "folder": str(one.folder.resolve()), "tags": self._tags(one)})

    def failed(self, one: PreparedJob, error: str) -> None:
        """Record a job that failed, also one that never reached the store itself."""
        if self._process is not None:
            self._ask({"ask": "failed", "folder": str(one.folder), "error": error})

    def _close(self) -> None:
        tags = self.tags | {"esper.failed_jobs": str(len(self.sweep.failures))} | split_text(tuning_text(self.sweep.tuned.values()), TUNED)
        files = [str(path) for path in self.files]
        self._ask({"ask": "close", "status": self.status, "artifacts": files, "metrics": self.metrics, "tags": tags})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        _send(self._process, request)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The answer to the oldest request that has none yet."""
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended unexpectedly"}
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "error" in answer:
            where = self.sweep.folder / LOG
            raise UserError(f"The sweep's tracking process failed: {answer['error']}; its last words are in {where}.")
        return answer


def _send(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    """Send a request; to a process that has ended nothing, which its missing answer tells."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
