"""A sweep that ended before its end goes on: finished jobs are skipped, an interrupted one goes on from its own newest checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esper.config import RootConfig, config_hash
from esper.errors import UserError
from esper.running.folder import hash_of, locked, status

NOTE, LOCK = "sweep.json", "sweep.lock"
DEEPEST = 4  # folders between the outputs and a sweep's note; the store beside them may hold thousands
ORPHAN_S = 60.0  # how long a job of a killed sweep may take to save what it has


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within: no other process runs the sweep in ``folder``. Raises UserError where one does."""
    with (folder / LOCK).open("a") as file:
        if not locked(file):
            raise UserError(f"The sweep in {folder} is running in another process; wait for it, or end it first.")
        yield


def taken_up(folder: Path, command: Sequence[str], output: Path) -> Path:
    """Where ``resume=auto`` lets a sweep of this command run: in the newest that did not end, else in ``folder``, which is new."""
    if (folder / NOTE).exists():  # named by the user
        return folder
    notes = [path for depth in range(DEEPEST + 1) for path in output.glob("*/" * depth + NOTE)]
    for path in sorted(notes, key=lambda path: path.stat().st_mtime, reverse=True):
        known = json.loads(path.read_text(encoding="utf-8"))
        if _words(known["command"]) == _words(command) and not known.get("ended") and not _runs(path.parent):
            _discard_new(folder)
            return path.parent.resolve()
    return folder


def goes_on(config: RootConfig, folder: Path) -> bool:
    """Whether ``folder`` holds a run of this configuration that did not end, or that the worker of a killed sweep still runs."""
    return status(folder) in ("KILLED", "DIED", "RUNNING") and hash_of(folder) == config_hash(config)


def wait_for_orphan(folder: Path) -> str:
    """How the run in ``folder`` ended. A worker whose sweep was killed saves what it has: it is waited for.

    Raises UserError when it does not end.
    """
    deadline = time.monotonic() + ORPHAN_S
    while (now := status(folder)) == "RUNNING":
        if time.monotonic() > deadline:
            raise UserError(f"Another process is running in {folder}; wait for it, or end it first.")
        time.sleep(0.1)
    return now


def _words(command: Sequence[str]) -> list[str]:
    """What makes the sweep: the words but for where it lies and that it goes on."""
    return sorted(word for word in command if not word.startswith(("hydra.sweep.dir=", "resume=", "hydra.launcher.")))


def _runs(folder: Path) -> bool:
    path = folder / LOCK
    if not path.exists():
        return False
    with path.open("a") as file:
        return not locked(file)


def _discard_new(folder: Path) -> None:
    """The folder that Hydra has made for a new sweep, with nothing of ours in it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
