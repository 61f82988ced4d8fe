"""Ctrl-C and SIGTERM that are not lost: Python drops the exception of a signal that comes while an object is being finalized."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from esper.errors import Terminated


class Stop:
    """Whether somebody has asked to stop, and how."""

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None

    def check(self) -> None:
        """Raise the exception of the signal that came, KeyboardInterrupt or Terminated, if one did."""
        if self.asked is not None:
            raise self.asked

    def _hear(self, number: int, frame: object) -> None:
        self.asked = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        raise self.asked


@contextmanager
def stopping() -> Iterator[Stop]:
    """Context in which both signals raise their exception at once, and are remembered should it get lost."""
    stop, before = Stop(), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop._hear)
    except ValueError:  # not the main thread, which alone may handle signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
