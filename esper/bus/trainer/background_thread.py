"""A thread whose failure is raised where it can be seen."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs ``work`` in a daemon thread; ``check`` and ``join`` raise what ended it."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._failure = error

    def check(self) -> None:
        """Raise what ended the thread, if something did."""
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait for the work to end."""
        self._thread.join()
        self.check()
