"""A run's own folder: whether a process runs there now, with which configuration, and how the run ended. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from esper.config import RootConfig, config_hash, plain
from esper.errors import Removed, UserError
from esper.feature_flags import FlagsConfig, KernelFlag
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary

CONFIG, LOCK = "config.yaml", "run.lock"
_held: set[Path] = set()  # a record lock keeps other processes out, this keeps out the process itself


class FolderLock:
    """A process's hold on the folder of its run. The note in ``run.lock`` says that there is a run here that did not end."""

    def __init__(self, config: RootConfig, folder: Path, file: IO[str]) -> None:
        self._config, self._folder, self._file = config, folder, file
        self._earlier = bool(_noted(file))
        self._begun = self._over = False
        if not self._earlier and not (folder / SUMMARY).exists():
            self._note()  # a run beside it of the same configuration must see that it is there

    def begin(self) -> None:
        """Note this configuration in the folder, once all checks have passed; an earlier note stays until then."""
        self._note()
        self._begun = True

    def end(self) -> None:
        """Mark the run as ended; the summary tells how."""
        self._over = True

    def refuse_removed(self) -> None:
        """Raise Removed if the folder was deleted or moved: the run's files would be lost, or written to a new folder."""
        if not self._there():
            raise Removed(errno.ENOENT, "was removed while its run was under way", str(self._folder))

    def leave(self) -> None:
        """Remove the note, unless its run did not end."""
        if self._there() and (self._over or not (self._earlier or self._begun)):
            (self._folder / LOCK).unlink()

    def _there(self) -> bool:
        try:
            return os.path.samestat((self._folder / LOCK).stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _note(self) -> None:
        temporary = self._folder / f".{CONFIG}.tmp"
        temporary.write_text(yaml.safe_dump(plain(self._config), sort_keys=False), encoding="utf-8")
        temporary.replace(self._folder / CONFIG)
        line = json.dumps({"config_hash": config_hash(self._config), "pid": os.getpid()}) + "\n"
        os.pwrite(self._file.fileno(), line.encode(), 0)  # at once, over the earlier line: whenever the process dies, the first is whole
        os.ftruncate(self._file.fileno(), len(line))


@contextmanager
def hold_folder(config: RootConfig, folder: Path) -> Iterator[FolderLock]:
    """Context in which this process owns the folder. A run that dies, or fails before its summary is written, leaves its note there.

    Raises:
        UserError: another process is running in this folder.
        Removed: something failed within, and the folder no longer exists.
    """
    with os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace") as file:
        _claim(file, folder.resolve())
        try:
            lock = FolderLock(config, folder, file)
            try:
                yield lock
            except Exception:
                lock.refuse_removed()  # which explains all that went wrong
                raise
            finally:
                lock.leave()
        finally:
            _held.discard(folder.resolve())


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run wrote, as plain values. Raises UserError for a file that is damaged."""
    path, way_out = folder / CONFIG, "restore it, or start a new run"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}; {way_out}.") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path} holds no configuration; {way_out}.")
    return _of_today(tree)


def _of_today(tree: dict[str, Any]) -> dict[str, Any]:
    """Upgrade a configuration from before there were flags: only the kernel had a percentage, as ``kernel.rollout``."""
    kernel = tree.get("kernel")
    if "flags" in tree or not isinstance(kernel, dict) or "rollout" not in kernel:
        return tree
    if not isinstance(kernel["rollout"], (int, float)):
        raise UserError(f"kernel.rollout={kernel['rollout']} is not accepted: it was a number from 0 to 1; restore {CONFIG}.")
    kept = {key: value for key, value in kernel.items() if key != "rollout"}
    flags = asdict(FlagsConfig(kernels=KernelFlag(percent=100.0 * float(kernel["rollout"]))))
    return {key: kept if key == "kernel" else value for key, value in tree.items()} | {"flags": flags}


def is_alive(folder: Path) -> bool:
    """Whether a process is running in ``folder`` now."""
    if folder.resolve() in _held:
        return True
    with (folder / LOCK).open("a") as file:
        return not try_lock(file)


def _claim(file: IO[str], folder: Path) -> None:
    if folder in _held or not try_lock(file):
        raise _taken(folder)
    _held.add(folder)


def _taken(folder: Path) -> UserError:
    return UserError(f"Another process is running in {folder}; wait for it, or end it first.")


def try_lock(file: IO[str]) -> bool:
    """Take a record lock; returns whether it was free. It belongs to the process, so that a loader's worker does not inherit it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def status(folder: Path) -> str:
    """RUNNING or DIED by the note a live process holds; else the status of the summary, NEW where there is neither."""
    if (folder / LOCK).exists():
        if is_alive(folder):
            return "RUNNING"
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            if _noted(file):
                return "DIED"
    if not (folder / SUMMARY).exists():
        return "NEW"
    found = read_summary(folder)
    if "status" not in found:
        raise UserError(f"{folder / SUMMARY} does not say how its run ended; restore it, or delete it so that the run counts as not ended.")
    return str(found["status"])


def refuse_running(folder: Path) -> None:
    """Raise UserError where a process runs in ``folder``."""
    if (folder / LOCK).exists() and is_alive(folder):
        raise _taken(folder)


def refuse_occupied(folder: Path) -> None:
    """Raise UserError where a new run in ``folder`` would take the place of another one, however that ended."""
    found = status(folder)
    if found == "NEW":
        return
    if found == "RUNNING":
        raise _taken(folder)
    if found == "FINISHED":
        what, way = "a finished run", f"esper resume={folder} trainer.steps=<more steps> trains it longer"
    else:
        what, way = "a run that did not come to its end", f"esper resume={folder} goes on with it"
    raise UserError(
        f"{folder} holds {what}, and no run takes the place of another: {way}, and without hydra.run.dir= a run gets a folder of its own. "
        "To replace it, delete that folder first."
    )


def hash_of(folder: Path) -> str:
    """The hash of the configuration that runs or ran in ``folder``; empty if none did, or it died before noting it."""
    path = folder / LOCK
    line = ""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            line = _noted(file)
    if line:
        try:
            return str(json.loads(line)["config_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it if no process runs in {folder}.") from error
    return str(read_summary(folder).get("config_hash", "")) if (folder / SUMMARY).exists() else ""


def _noted(file: IO[str]) -> str:
    """The note in ``run.lock``: its first line."""
    file.seek(0)
    return file.readline().strip()
