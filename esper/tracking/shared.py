"""A tracker whose MLflow process serves a whole sweep: one process writes to the store, however many jobs run."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

from esper.bus.messages import Message
from esper.tracking import frames
from esper.tracking.config import MlflowConfig
from esper.tracking.record import RunRecord
from esper.tracking.tracker import TrackerError

#: Environment variable with the path of the sweep's socket; set in a sweep's workers.
SOCKET = "ESPER_TRACKER"


class MlflowShared:
    """Hands everything to the sweep's store process (``esper.compare.writer``) over a Unix socket."""

    called = "MLflow"

    def __init__(self, config: MlflowConfig, path: str) -> None:
        self.config = config
        self.wants_model = config.model
        self._path = path

    def open(self, record: RunRecord) -> None:
        """Connect and open the MLflow run."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(self._path)
        except OSError as error:
            raise TrackerError(f"the sweep's tracking process at {self._path} cannot be reached: {error}") from error
        self._socket.settimeout(self.config.close_s)
        self._stream = self._socket.makefile("rwb")
        self._ask(frames.Open(self.config, record))

    def record(self, messages: Sequence[Message]) -> None:
        """Pass on; when other jobs keep the store busy the kernel's buffer fills and this waits."""
        self._send(frames.Record(list(messages)))

    def flush(self) -> None:
        """Wait until everything passed on is in the store."""
        self._ask(frames.Flush())

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the run and the connection."""
        try:
            self._ask(frames.Close(status, dict(summary)))
        finally:
            self._stream.close()
            self._socket.close()

    def _send(self, frame: frames.Frame) -> None:
        try:
            frames.write(self._stream, frame)
        except OSError as error:
            raise TrackerError(f"the sweep's tracking process went away: {error}") from error

    def _ask(self, frame: frames.Frame) -> None:
        self._send(frame)
        try:
            reply = frames.read(self._stream, frames.Reply)
        except TimeoutError:
            wait = f"{self.config.close_s:.0f} s (tracking.close_s)"
            raise TrackerError(f"the sweep's tracking process did not answer within {wait}") from None
        except (EOFError, OSError) as error:
            raise TrackerError(f"the sweep's tracking process went away: {error}") from error
        if reply.error:
            raise TrackerError(reply.error)
