"""Saving during training: the state is copied between two steps, and a thread writes the copy to disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esper.checkpoint import disk
from esper.checkpoint.disk import Checkpoint, Copy


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep: the newest ``keep``, the ``best`` by validation, and all younger than ``hours``."""

    keep: int = 2
    best: int = 1
    hours: float = 0.0


class Saver:
    """Writes copies of the state to disk in a thread, one at a time. An error of the thread is raised by the next call.

    ``settled`` is called in the thread before a checkpoint counts. It tells whether every message published before the copy was taken
    is stored by the trackers; if not, the earlier checkpoint stays the newest. ``written`` is called with each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        settled: Callable[[], bool] = lambda: True,
        written: Callable[[Checkpoint], None] = lambda checkpoint: None,
    ) -> None:
        self.folder = folder
        self.retention = retention
        self._settled, self._written = settled, written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.skipped = 0  # saves that were due while another was being written
        self.stalled_s: list[float] = []

    @property
    def busy(self) -> bool:
        """Whether a copy is still on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, take: Callable[[], Copy], wait: bool = False) -> bool:
        """Take a copy and write it. While the copy before is being written, this one is skipped, or waits for it if ``wait``.

        Returns whether a copy was taken. With ``wait`` it is on disk when this returns.
        """
        if self.busy and not wait:
            self.skipped += 1
            return False
        self.wait()
        began = time.perf_counter()
        taken = take()
        self.stalled_s.append(time.perf_counter() - began)
        self._thread = threading.Thread(target=self._write, args=(taken,), name="esper-checkpoint")
        self._thread.start()
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Wait until the last copy is on disk; raises the error of the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, taken: Copy) -> None:
        try:
            if not self._settled():
                return
            checkpoint = disk.write(taken, self.folder)
            disk.retain(self.folder, self.retention.keep, self.retention.best, self.retention.hours)
            self._written(checkpoint)
        except BaseException as error:  # a full disk: said where training is, by the next save or at the end
            self._error = error
