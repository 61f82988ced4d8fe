"""A tracker whose work is done by another process, so that training keeps its interpreter to itself."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from pathlib import Path

import esper
from esper.tracking import frames
from esper.tracking.config import MlflowConfig
from esper.tracking.framed import Framed
from esper.tracking.run_info import RunRecord
from esper.tracking.tracker import TrackerError

LOG = "tracker.log"


class MlflowApart(Framed):
    """Hands everything to ``esper.tracking.worker``; its errors come back as TrackerError."""

    def __init__(self, config: MlflowConfig) -> None:
        super().__init__(config)
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self, folder: Path, outputs: Path) -> None:
        """Start the process, which imports MLflow and tries the store meanwhile; returns at once, ``open`` has its answer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        root = str(Path(esper.__file__).resolve().parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),  # its 7 take minutes
            "CUDA_VISIBLE_DEVICES": "",  # its libraries must not touch the trainer's GPU; NVML sees it all the same
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "esper.tracking.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the trainer
            )  # fmt: skip
        self._send(frames.Prepare(self.config, str(outputs), str(folder)))

    def open(self, record: RunRecord) -> None:
        """Wait until the MLflow run exists (seconds; the caller is a thread of its own)."""
        if self._process is None:
            self.prepare(Path(record.folder), Path(record.outputs))
        try:
            self._wait()
            self._ask(frames.Open(self.config, record))
        except Exception:
            self._stop()
            raise

    def let_go(self) -> None:
        """End a process that nobody opened, when it is through with what it does: a store must not be left half made.

        Harmless after ``close``.
        """
        self._stop(self.config.close_s)

    def _ask(self, frame: frames.Frame) -> None:
        self._send(frame)
        self._wait()

    def _wait(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], self.config.close_s)
        if not ready:
            self._stop()
            raise TrackerError(f"the tracking process did not answer within {self.config.close_s:.0f} s (tracking.close_s)")
        self._answer()

    def _answer(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        try:
            reply = frames.read(self._process.stdout, frames.Reply)
        except EOFError:
            code = self._process.wait()
            raise TrackerError(f"the tracking process ended with code {code}; its last words are in {self._log}") from None
        self._heed(reply)

    def _send(self, frame: frames.Frame) -> None:
        assert self._process is not None and self._process.stdin is not None, "open() comes first"
        try:
            frames.write(self._process.stdin, frame)
        except BrokenPipeError:
            self._answer()  # it said why before it went, or not even that
            raise TrackerError(f"the tracking process went away; its last words are in {self._log}") from None

    def _stop(self, patience_s: float = 5.0) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it has gone already
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]
        if self._log.exists() and not self._log.stat().st_size:
            self._log.unlink()
