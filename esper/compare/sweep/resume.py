"""Resuming a sweep: its note and its lock, the sweep that ``resume=auto`` finds, and the jobs that continue from a checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.config import RootConfig, config_hash
from esper.errors import UserError
from esper.running.run_folder import hash_of, refuse_occupied, status, try_lock

NOTE, LOCK = "sweep.json", "sweep.lock"
DEEPEST = 4  # folders between the outputs and a sweep's note; the store beside them may hold thousands
ORPHAN_S = 60.0  # how long a job of a killed sweep may take to save its state


@contextmanager
def sweep_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the sweep in ``folder``. Raises UserError where another process runs it."""
    with (folder / LOCK).open("a") as file:
        if not try_lock(file):
            raise _running(folder)
        yield


def _running(folder: Path) -> UserError:
    return UserError(f"The sweep in {folder} is running in another process; wait for it, or end it first.")


def refuse_taken_folder(folder: Path) -> None:
    """Raise UserError where ``folder`` belongs to a run, or to a sweep under way; a sweep that has ended can be resumed there."""
    if (folder / LOCK).exists() and _runs(folder):
        raise _running(folder)
    if not (folder / NOTE).exists():
        refuse_occupied(folder)


def read_note(folder: Path) -> dict[str, Any]:
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


def write_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Write the note of the sweep in ``folder``, whole or not at all."""
    partial = folder / f".{NOTE}"
    partial.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / NOTE)


def sweep_to_resume(folder: Path, command: Sequence[str], output: Path) -> Path:
    """The folder in which ``resume=auto`` runs a sweep of this command: that of the newest that did not end, else ``folder``, a new one.

    A note that cannot be read is passed over with a warning. Raises UserError where a sweep of this command is under way.
    """
    if (folder / NOTE).exists():  # named by the user
        return folder
    notes = [path for depth in range(DEEPEST + 1) for path in output.glob("*/" * depth + NOTE)]
    found: list[Path] = []
    for path in sorted(notes, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            note = read_note(path.parent)
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


def can_resume(config: RootConfig, folder: Path) -> bool:
    """Whether ``folder`` has a run of this configuration that did not end, or that the worker of a killed sweep still runs."""
    return status(folder) in ("KILLED", "DIED", "RUNNING") and hash_of(folder) == config_hash(config)


def wait_for_orphan(folder: Path, seconds: float) -> str:
    """The status with which the run in ``folder`` ended. It waits for the worker of a killed sweep, which
    saves its state, for ``seconds`` at most.

    Raises UserError when it does not end.
    """
    deadline = time.monotonic() + seconds
    while (now := status(folder)) == "RUNNING":
        if time.monotonic() > deadline:
            raise UserError(f"Another process is running in {folder}; wait for it, or end it first.")
        time.sleep(0.1)
    return now


def _words(command: Sequence[str]) -> list[str]:
    """The words that make the sweep, without those on its folder, resuming and the launcher."""
    return sorted(word for word in command if not word.startswith(("hydra.sweep.dir=", "resume=", "hydra.launcher.", "hydra/launcher=")))


def _runs(folder: Path) -> bool:
    path = folder / LOCK
    if not path.exists():
        return False
    with path.open("a") as file:
        return not try_lock(file)


def _discard_new(folder: Path) -> None:
    """Remove the folder that Hydra has made for a new sweep, if nothing else is in it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
