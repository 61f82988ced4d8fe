"""The views that a page draws: of one run, and of a sweep with its jobs. ``update`` looks again, ``snapshot`` gives plain values."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from esper.inventory.entries import Entry
from esper.inventory.folder import JOB_NOTE, Found, entries, is_swept, sweep_entry
from esper.watch.feeds import Feed, FolderFeed
from esper.watch.state import RunState

ENDED = ("FINISHED", "FAILED", "KILLED", "DIED", "STOPPED", "DAMAGED")
BRIEF = ("tick", "total", "loss", "metric", "value", "stages", "left_s", "steps_per_second")
ALERTS = 20  # of all jobs


class View(Protocol):
    """A run or a sweep that is watched."""

    def update(self) -> None:
        """Look again."""

    def snapshot(self) -> dict[str, Any]:
        """What is known, as JSON knows it; ``kind`` is run or sweep, ``status`` one of ENDED when it is over."""

    def close(self) -> None:
        """Let go of what is open."""


class RunView:
    """One run."""

    def __init__(self, name: str, feed: Feed, primary: str = "") -> None:
        self.feed, self.state = feed, RunState(name, primary)
        self._heard = time.monotonic()

    def update(self) -> None:
        """Take in what came."""
        found = self.feed.poll()
        if found:
            self._heard = time.monotonic()
        self.state.take(found)

    def snapshot(self) -> dict[str, Any]:
        """The run's state, where it comes from, and how many seconds ago something was heard."""
        return self.state.snapshot() | {
            "kind": "run",
            "place": self.feed.place,
            "problem": self.feed.problem,
            "heard_s": round(time.monotonic() - self._heard, 1),
        }

    def close(self) -> None:
        """Let go of the bus."""
        if isinstance(self.feed, FolderFeed):
            self.feed.close()


class SweepView:
    """A sweep: its jobs by status, and the runs that are under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._views: dict[str, RunView] = {}
        self._jobs: list[Entry] = []
        self._spent: dict[str, float] = {}

    def update(self) -> None:
        """Look at the folder, and at the feeds of the jobs that run."""
        self._jobs = [entry for entry in entries(self.folder) if entry.kind == "job"]
        running = {entry.id: entry for entry in self._jobs if entry.status == "RUNNING" and entry.folder is not None}
        for id in [id for id in self._views if id not in running]:
            self._views.pop(id).close()
        for id, entry in running.items():
            if id not in self._views and entry.folder is not None:
                self._views[id] = RunView(entry.name, FolderFeed(entry.folder))
            self._views[id].update()
        for entry in self._jobs:
            if entry.id not in self._spent and entry.status == "FINISHED" and entry.folder is not None:
                self._spent[entry.id] = _seconds(entry.folder / JOB_NOTE)

    def snapshot(self) -> dict[str, Any]:
        """The sweep with a row a job: those that run first, then the newest."""
        sweep = sweep_entry(Found("sweep", self.folder, frozenset(path.name for path in self.folder.iterdir())))
        running = {id: view.snapshot() for id, view in self._views.items()}
        jobs = sorted(self._jobs, key=lambda entry: (entry.id not in running, -entry.changed))
        total = max(sweep.jobs, len(jobs))
        done = sum(entry.status in ("FINISHED", "FAILED") for entry in jobs)
        alerts = [alert | {"run": state["name"]} for state in running.values() for alert in state["alerts"]]
        return {
            "kind": "sweep",
            "name": sweep.name,
            "status": "RUNNING" if is_swept(self.folder) else sweep.status,
            "verdict": sweep.verdict,
            "done": done,
            "failed": sum(entry.status == "FAILED" for entry in jobs),
            "jobs": total,
            "left_s": self._left(total - done, len(running)) if is_swept(self.folder) else 0.0,
            "place": f"files in {self.folder}",
            "problem": "",
            "runs": [_row(entry, running.get(entry.id)) for entry in jobs],
            "alerts": alerts[:ALERTS],
        }

    def _left(self, jobs: int, workers: int) -> float | None:
        """Seconds that the remaining jobs take at the mean of those that have ended."""
        known = [seconds for seconds in self._spent.values() if math.isfinite(seconds)]
        return jobs * sum(known) / len(known) / max(1, workers) if known else None

    def close(self) -> None:
        """Let go of the jobs' buses."""
        for view in self._views.values():
            view.close()


def _seconds(note: Path) -> float:
    """How long a job took, NaN where its note does not say."""
    try:
        return float(json.loads(note.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


def _row(entry: Entry, state: dict[str, Any] | None) -> dict[str, Any]:
    value = entry.value if math.isfinite(entry.value) else None
    row: dict[str, Any] = {"name": entry.name, "status": entry.status, "metric": entry.metric, "value": value, "stages": {}}
    return row | ({key: state[key] for key in BRIEF} | {"metric": state["metric"]} if state else {})
