"""What may go: attempts that a sweep has set aside, runs that failed or were stopped, checkpoints of finished runs. Nothing else does.

A sweep with its plan and results stays, and so do the jobs that its comparison counts, whatever became of them; a finished run stays, with
its checkpoints removed at most; nothing of a run or a sweep that is under way is touched.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from esper.compare.sweep.resume import sweep_lock
from esper.errors import UserError
from esper.inventory.entries import RUNNING, Entry
from esper.inventory.folder import Found, is_swept, run_entry, walk
from esper.inventory.own_files import CHECKPOINTS, Contents, contents, remove_empty
from esper.running.run_folder import LOCK, refuse_running, status, try_lock

KINDS = {
    "attempts": "earlier attempts of a sweep's jobs, which it has set aside",
    "failed": "runs that failed before they had a result",
    "stopped": "runs that were stopped or died, which esper resume= could go on with",
    "checkpoints": "checkpoints of finished runs, from which they could be trained longer or forked",
}
UNASKED = ("attempts", "failed")
"""The kinds that go where no other is named: nothing can be done with them any more."""


@dataclass(frozen=True)
class Item:
    """One thing that may go: a run's whole folder, or its part ``below``."""

    kind: str
    entry: Entry
    folder: Path
    inside: Contents
    below: str = ""
    sweep: Path | None = None

    @property
    def place(self) -> Path:
        """The folder that goes."""
        return self.folder / self.below


def may_go(output: Path) -> list[Item]:
    """All that may go below ``output``, the largest first.

    Raises:
        UserError: the folder cannot be read.
    """
    found: list[Item] = []
    swept: dict[Path, bool] = {}
    for one in walk(output):
        if one.sweep is not None and swept.setdefault(one.sweep, is_swept(one.sweep)):
            continue
        if one.kind != "sweep" and (item := _item(one)) is not None:
            found.append(item)
    return sorted(found, key=lambda item: -item.inside.size)


def _item(found: Found) -> Item | None:
    entry = run_entry(found)
    if entry.status == RUNNING:
        return None
    kind = ""
    if found.attempt:
        kind = "attempts"
    elif entry.status == "FINISHED":
        kind = "checkpoints" if (found.path / CHECKPOINTS).is_dir() and not (found.path / CHECKPOINTS).is_symlink() else ""
    elif found.sweep is None and not math.isfinite(entry.value):  # a run that has its result failed at most to record it
        kind = {"FAILED": "failed", "KILLED": "stopped", "DIED": "stopped"}.get(entry.status, "")
    if not kind:
        return None
    below = CHECKPOINTS if kind == "checkpoints" else ""
    inside = contents(found.path, below)
    return Item(kind, entry, found.path, inside, below, found.sweep) if inside.own else None


def remove(item: Item) -> list[Path]:
    """Remove esper's own files of an item, and the folders that are empty then; returns what was left in place.

    Raises:
        UserError: the run, its sweep or its bus is in use now.
        OSError: a file cannot be removed.
    """
    with _held(item):
        inside = contents(item.folder, item.below)  # again: what came since is looked at too
        for path in sorted(inside.own, key=lambda path: path.name == LOCK):  # the lock last, so that no run begins meanwhile
            path.unlink()
        remove_empty(item.place)
    return inside.others


@contextmanager
def _held(item: Item) -> Iterator[None]:
    """Context in which no run can begin in the item's folder, no sweep around it, and its bus's server is known to have ended."""
    with ExitStack() as held:
        if item.sweep is not None:
            held.enter_context(sweep_lock(item.sweep))
        refuse_running(item.folder)
        if status(item.folder) != item.entry.status and item.kind != "attempts":
            raise UserError("its run has gone on meanwhile")
        lock = held.enter_context((item.folder / LOCK).open("a"))
        if not try_lock(lock):
            raise UserError(f"Another process is running in {item.folder}; wait for it, or end it first.")
        server = item.folder / "bus" / "server" / "lock"
        if not item.below and server.exists():
            with server.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"The bus's server in {server.parent} still runs; end it first.") from None
        try:
            yield
        finally:
            if item.below:  # a finished run has no lock
                (item.folder / LOCK).unlink(missing_ok=True)
