"""A run's own folder: who is running there now, which configuration it is of, and how it ended. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import yaml

from esper.config import RootConfig, config_hash, plain
from esper.errors import UserError
from esper.report.summary import NAME as SUMMARY
from esper.report.summary import read_summary

CONFIG, LOCK = "config.yaml", "run.lock"
_held: set[Path] = set()  # a record lock keeps other processes out, this keeps out the process itself


@contextmanager
def alive(config: RootConfig, folder: Path) -> Iterator[None]:
    """Within: the folder is this process's own, and a process that dies in here leaves a note that it did not end.

    Raises:
        UserError: another process is running in this folder.
    """
    path = folder / LOCK
    with path.open("a+") as file:
        _claim(file, folder.resolve())
        try:
            file.seek(0)
            file.truncate()
            json.dump({"pid": os.getpid(), "config_hash": config_hash(config)}, file)
            file.flush()
            temporary = folder / f".{CONFIG}.tmp"
            temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
            temporary.replace(folder / CONFIG)
            yield
        finally:
            path.unlink()
            _held.discard(folder.resolve())


def is_alive(folder: Path) -> bool:
    """Whether a process is running in ``folder`` now."""
    if folder.resolve() in _held:
        return True
    with (folder / LOCK).open("a") as file:
        return not locked(file)


def _claim(file: IO[str], folder: Path) -> None:
    if folder in _held or not locked(file):
        raise UserError(f"Another process is running in {folder}; wait for it, or end it first.")
    _held.add(folder)


def locked(file: IO[str]) -> bool:
    """A record lock, which belongs to the process: a loader's worker that outlives it for a moment does not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def status(folder: Path) -> str:
    """RUNNING or DIED by the note a live process holds; else what the summary says, NEW where there is neither."""
    if (folder / LOCK).exists():
        return "RUNNING" if is_alive(folder) else "DIED"
    if not (folder / SUMMARY).exists():
        return "NEW"
    found = read_summary(folder)
    if "status" not in found:
        raise UserError(f"{folder / SUMMARY} does not say how its run ended; restore it, or delete it so that the run counts as not ended.")
    return str(found["status"])


def hash_of(folder: Path) -> str:
    """The hash of the configuration that runs or ran in ``folder``; empty where none did, or it died before it noted it."""
    note = folder / LOCK
    if note.exists() and note.stat().st_size:
        try:
            return str(json.loads(note.read_text(encoding="utf-8"))["config_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{note} cannot be read ({error}); delete it if no process runs in {folder}.") from error
    return str(read_summary(folder).get("config_hash", "")) if (folder / SUMMARY).exists() else ""
