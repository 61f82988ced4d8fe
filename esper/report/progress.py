"""The progress bar: a tracker that shows instead of keeping."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esper.messages import Alert, Message
from esper.report.progress_state import ProgressState
from esper.tracking.run_info import RunRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_S = 10.0  # without a terminal: a line this often


class ProgressBar:
    """Draws on standard error; where that is no terminal, a plain line now and then.

    Give it a TrackerRunner of its own, so that a slow store does not stop the bar.

    Alerts of level warning and error are printed as they come.
    """

    wants_model = False
    called = "the progress bar"

    def __init__(self, console: Console | None = None, *, plain_s: float = PLAIN_S) -> None:
        self._console, self._plain_s = console, plain_s
        self._bar: Progress | None = None

    def open(self, record: RunRecord) -> None:
        """Nothing is drawn before the run says how long it is."""
        from rich.console import Console

        self._console = self._console or Console(stderr=True, file=sys.stderr)
        self.state = ProgressState(record.primary)
        self._said = time.monotonic()

    def record(self, messages: Sequence[Message]) -> None:
        """Learn and redraw once."""
        assert self._console is not None
        for message in messages:
            self.state.take(message)
            if isinstance(message, Alert) and message.level != "info":
                colour = "red" if message.level == "error" else "yellow"
                self._console.print(f"[{colour}]{message.level}[/] (tick {message.tick}):", end=" ")
                self._console.print(message.text, markup=False, highlight=False)
        self.state.mark()
        if self._console.is_terminal:
            self._draw()
        elif time.monotonic() - self._said >= self._plain_s:
            self._say()

    def _draw(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[line]}", markup=False)
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._task = self._bar.add_task("", total=max(1, self.state.total), line="")
            self._bar.start()
        self._bar.update(self._task, completed=self.state.tick, total=max(1, self.state.total), line=self.state.line())
        self._bar.refresh()

    def _say(self) -> None:
        assert self._console is not None
        self._said = time.monotonic()
        line = f"{self.state.tick}/{self.state.total} · {self.state.line()}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self.state.total:
            self._say()
