"""A sweep that ended before its end goes on: finished jobs are skipped, an interrupted one goes on from its own newest checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.config import RootConfig, config_hash
from esper.errors import UserError
from esper.running.run_folder import hash_of, refuse_occupied, status, try_lock

NOTE, LOCK = "sweep.json", "sweep.lock"
DEEPEST = 4  # folders between the outputs and a sweep's note; the store beside them may hold thousands
ORPHAN_S = 60.0  # how long a job of a killed sweep may take to save what it has


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within: no other process runs the sweep in ``folder``. Raises UserError where one does."""
    with (folder / LOCK).open("a") as file:
        if not try_lock(file):
            raise _running(folder)
        yield


def _running(folder: Path) -> UserError:
    return UserError(f"The sweep in {folder} is running in another process; wait for it, or end it first.")


def refuse_taken(folder: Path) -> None:
    """Raise UserError where ``folder`` is a run's, or that of a sweep under way; one that is not goes on there."""
    if (folder / LOCK).exists() and _runs(folder):
        raise _running(folder)
    if not (folder / NOTE).exists():
        refuse_occupied(folder)


def known(folder: Path) -> dict[str, Any]:
    """The note of the sweep in ``folder``, empty where none was begun. Raises UserError for one that is damaged."""
    path = folder / NOTE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["command"], list):
            raise TypeError("command is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and what the sweep has done is kept but no longer found.") from error
    return dict(found)


def taken_up(folder: Path, command: Sequence[str], output: Path) -> Path:
    """Where ``resume=auto`` lets a sweep of this command run: in the newest that did not end, else in ``folder``, which is new.

    A note of which that cannot be told is passed over, and said. Raises UserError where a sweep of this command is under way.
    """
    if (folder / NOTE).exists():  # named by the user
        return folder
    notes = [path for depth in range(DEEPEST + 1) for path in output.glob("*/" * depth + NOTE)]
    found: list[Path] = []
    for path in sorted(notes, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            note = known(path.parent)
        except UserError as error:
            print(f"esper: {error}", file=sys.stderr)
            continue
        if _words(note["command"]) == _words(command):
            if _runs(path.parent):
                _discard_new(folder)
                raise UserError(
                    f"A sweep of these very words is under way in {path.parent.resolve()}: wait for it, or end it first. Without "
                    "resume=auto another one begins beside it."
                )
            if not note.get("ended"):
                found.append(path.parent.resolve())
    if not found:
        return folder
    _discard_new(folder)
    return found[0]


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
        return not try_lock(file)


def _discard_new(folder: Path) -> None:
    """The folder that Hydra has made for a new sweep, with nothing of ours in it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
