"""One worker on a machine that may be another than the sweep's, as Ray and Slurm start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import esper
from esper.compare.sweep.worker_pool import SAVE_S, Answer, Request, WorkerPool, local_pool
from esper.tracking.remote import SOCKET

LOST = "its node was lost"
LOOK_S = 0.5
_HANDED_ON = ("MLFLOW_", "ESPER_")


def environment(threads: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the sweep that its workers elsewhere need too: of MLflow, of esper, and of numerical libraries."""
    return {key: value for key, value in os.environ.items() if key.startswith(_HANDED_ON) and key != SOCKET} | dict(threads)


class Node:
    """A worker process, and beside it one that writes its runs to MLflow.

    Both end with this process, however it ends: the worker saves its job's state then, because it has lost who would take its answer.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="esper-")
        self._socket = str(Path(self._home.name) / "store")
        self._writer: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._saved = False
        self._stopped, self._over = threading.Event(), threading.Event()
        os.environ.update(variables)
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        self._pool: WorkerPool = local_pool([{**variables, SOCKET: self._socket}])

    def ready(self) -> int:
        """The number of this process; asked for to know that it is there."""
        return os.getpid()

    def ask(self, request: Request) -> Answer:
        """The worker's answer. One that :meth:`end` stops has ``stopped`` in it, and whether the state of its job is ``saved``."""
        with self._lock:
            if self._stopped.is_set():
                return {"status": "FAILED", "error": "its worker was stopped before", "seconds": 0.0, "stopped": True, "saved": True}
            error = self._attach(request.get("store") or {})
        if error:
            return {"status": "FAILED", "error": error, "seconds": 0.0}
        answer = self._pool.ask({key: value for key, value in request.items() if key != "store"})
        if self._stopped.is_set() and answer.get("status") == "FAILED":
            self._over.wait(SAVE_S)
            return answer | {"stopped": True, "saved": self._saved}
        return answer

    def end(self) -> bool:
        """Stop the job under way and end; whether there was none, or its state is saved."""
        with self._lock:
            first = not self._stopped.is_set()
            self._stopped.set()
        if first:
            self._pool.__exit__(None)
            self._saved = self._pool.saved
            if self._writer is not None and self._writer.stdin is not None:
                self._writer.stdin.close()
                self._writer.wait(SAVE_S)
            self._home.cleanup()
            self._over.set()
        self._over.wait(SAVE_S)
        return self._saved

    def _attach(self, opening: Mapping[str, Any]) -> str:
        """Have the process that writes to MLflow know the run that comes; what it refuses, empty where it takes the run."""
        if not opening:
            return ""
        if self._writer is None:
            self._writer = self._start_writer()
            return self._tell({"ask": "prepare", "uri": opening["uri"]}) or self._tell(opening)
        (folder, tags), *_ = opening["jobs"].items()
        return self._tell({"ask": "add", "folder": folder, "tags": tags})

    def _start_writer(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(Path(esper.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            [sys.executable, "-m", "esper.compare.sweep.mlflow_writer", self._socket],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def _tell(self, request: Mapping[str, Any]) -> str:
        assert self._writer is not None and self._writer.stdin is not None and self._writer.stdout is not None
        try:
            self._writer.stdin.write(json.dumps(request) + "\n")
            self._writer.stdin.flush()
            line = self._writer.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended unexpectedly"}
        if "refused" not in answer and "error" not in answer:
            return ""
        self._writer.kill()
        self._writer.wait()
        self._writer = None  # the next job has a new one
        return str(answer.get("refused") or f"the process that writes to MLflow failed: {answer['error']}")


def _end_with(parent: int) -> None:
    """End this process, and its worker, once its parent is gone: the process that makes a node one of Ray's, say."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
