"""The interface of a tracker: four methods, called from one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from esper.errors import TrackerError as TrackerError
from esper.messages import Message, Telemetry
from esper.tracking.run_info import RunInfo

if TYPE_CHECKING:
    import numpy as np

STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker(Protocol):
    """Records the messages of one run. ``wants_model``: it reads the final model from the run's folder on ``close``.

    A tracker may have a fifth method, ``try_out()``: called before any tracker is opened, it raises where the tracker could not work.
    """

    wants_model: bool

    def open(self, info: RunInfo) -> None:
        """Before the first message; a run known from before (resumed) is continued."""

    def record(self, messages: Sequence[Message]) -> None:
        """Take a batch of messages; they may still be in memory on return."""

    def flush(self) -> None:
        """Make all recorded messages durable: after this they are acknowledged."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End with one of STATUSES; ``summary`` is that of RunEnded, empty when the run did not get there."""


def rows(message: Telemetry) -> np.ndarray:
    """The values of a telemetry message, float32 ``[ticks, seeds, columns]``, read-only.

    Raises TrackerError for a codec that is not ``raw``: the bus decodes before it delivers.
    """
    import numpy as np  # here, since the settings of the group tracking must not wait for it

    if message.codec != "raw":
        raise TrackerError(f"telemetry of site {message.site!r} came in codec {message.codec!r}, expected 'raw'")
    shape = (len(message.ticks), message.seeds, len(message.columns))
    return np.frombuffer(message.data, dtype="<f4").reshape(shape)
