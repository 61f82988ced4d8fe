"""What trackers share whose work another process does: they say everything in frames, and only how a frame travels differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esper.errors import TrackerError, UserError
from esper.messages import Message
from esper.tracking import frames
from esper.tracking.config import MlflowConfig


class Framed:
    """Base of ``MlflowApart`` and ``MlflowShared``, which open, send, ask (and wait for the answer) and stop in their own ways."""

    called = "MLflow"

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self.wants_model = config.model

    def record(self, messages: Sequence[Message]) -> None:
        """Pass on; a slow other side makes this wait, and the bus holds what comes meanwhile."""
        self._send(frames.Record(list(messages)))

    def flush(self) -> None:
        """Wait until everything passed on is in the store."""
        self._ask(frames.Flush())

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the run and the connection."""
        try:
            self._ask(frames.Close(status, dict(summary)))
        finally:
            self._stop()

    def _heed(self, reply: frames.Reply) -> None:
        """Raise what the other side says went wrong: UserError for what the user can mend."""
        if reply.refused:
            raise UserError(reply.error)
        if reply.error:
            raise TrackerError(reply.error)

    def _send(self, frame: frames.Frame) -> None:
        raise NotImplementedError(type(self).__name__)

    def _ask(self, frame: frames.Frame) -> None:
        raise NotImplementedError(type(self).__name__)

    def _stop(self) -> None:
        raise NotImplementedError(type(self).__name__)
