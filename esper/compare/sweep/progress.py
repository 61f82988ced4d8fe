"""The table of jobs that a person watches while a sweep runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from esper.compare.sweep.arms import Job

STATES = ("done", "running", "waiting", "failed", "kept")
PRUNED = "pruned"  # of a search; other sweeps have no such column
COLOURS = {"done": "green", "running": "yellow", "waiting": "dim", "failed": "red", "kept": "cyan", PRUNED: "magenta"}


class Progress:
    """Counts by row (an arm, or its tuning), refreshed in place in a terminal; elsewhere one line for each job.

    Failures are printed when they happen.
    """

    def __init__(self, rows: Mapping[str, Sequence[Job]], console: Console) -> None:
        self.rows = rows
        self.console = console
        self.state = dict.fromkeys((job.number for jobs in rows.values() for job in jobs), "waiting")
        self._began = time.monotonic()
        self._finished = 0
        self._live = Live(self.table(), console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(self.table())
            self._live.stop()

    def kept(self, job: Job, state: str) -> None:
        """A job that an earlier start has done (``kept``) or failed."""
        self.state[job.number] = state

    def started(self, job: Job) -> None:
        """A worker has taken the job."""
        self.state[job.number] = "running"
        self._refresh()

    def finished(self, job: Job, seconds: float, error: str, log: str, pruned: bool = False) -> None:
        """A job has ended; ``error`` is empty when it went well, also when it was ``pruned``."""
        self.state[job.number] = "failed" if error else PRUNED if pruned else "done"
        self._finished += 1
        if error:
            self.console.print(f"[red]failed[/] {escape(job.label)}: {escape(error)}; its log is {escape(log)}")
        elif not self._live:
            self.console.print(f"{self._finished}/{self._open()} {escape(job.label)} {self.state[job.number]} in {seconds:.1f} s")
        self._refresh()

    def _open(self) -> int:
        counts = Counter(self.state.values())
        return self._finished + counts["waiting"] + counts["running"]

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self.table())

    def table(self) -> Table:
        """Arms and their tuning in rows, states in columns, with the time left at the present pace."""
        left = ""
        if self._finished:
            pace = (time.monotonic() - self._began) / self._finished
            left = f", about {pace * (self._open() - self._finished):.0f} s left"
        table = Table(title=f"{self._finished} of {self._open()} jobs{left}", title_justify="left")
        table.add_column("arm")
        states = (*STATES, PRUNED) if PRUNED in self.state.values() else STATES
        for state in states:
            table.add_column(state, justify="right", style=COLOURS[state])
        for name, jobs in self.rows.items():
            counts = Counter(self.state[job.number] for job in jobs)
            table.add_row(escape(name) or "–", *(str(counts[state]) for state in states))
        return table
