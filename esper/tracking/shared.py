"""A tracker whose MLflow process serves a whole sweep: one process writes to the store, however many jobs run."""

from __future__ import annotations

import socket

from esper.tracking import frames
from esper.tracking.config import MlflowConfig
from esper.tracking.framed import Framed
from esper.tracking.run_info import RunRecord
from esper.tracking.tracker import TrackerError

#: Environment variable with the path of the sweep's socket; set in a sweep's workers.
SOCKET = "ESPER_TRACKER"


class MlflowShared(Framed):
    """Hands everything to the sweep's store process (``esper.compare.sweep.mlflow_writer``) over a Unix socket."""

    def __init__(self, config: MlflowConfig, path: str) -> None:
        super().__init__(config)
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

    def _stop(self) -> None:
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
        self._heed(reply)
