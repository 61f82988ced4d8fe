"""Checkpoints in a folder: written under another name and renamed, read only if every byte is as it was written.

``<folder>/<step>/manifest.json`` names the parts, ``state.json`` and ``tensors.safetensors``, with their sizes and a SHA-256 for every
16 MiB, and carries a SHA-256 of itself. A folder named after a step is complete; while it is being written or deleted, its name begins
with a dot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import esper
from esper.checkpoint.files import Written, fsync_folder, map_bytes, parse_tensors, read_bytes, write_bytes, write_tensors, written
from esper.checkpoint.schema import SCHEMA, manifest_of_today, state_of_today
from esper.checkpoint.shards import SHARDS, locate, refuse_missing
from esper.checkpoint.tree import join, split
from esper.errors import UserError

FORMAT = "esper checkpoint"
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk as its manifest describes it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.manifest["step"])


@dataclass(frozen=True)
class Copy:
    """A state copied into memory, waiting to be written."""

    step: int
    tick: int
    topology: Any
    plain: Any
    tensors: dict[str, Any]
    score: float | None
    shards: Path | None = None


def copy(state: dict[str, Any], step: int, tick: int, topology: Any, score: float | None, shards: Path | None = None) -> Copy:
    """Copy a state into memory; ``score`` (larger is better, None unknown) decides which checkpoint is the best.

    ``shards`` is a folder beside the checkpoints with the state's sharded tensors, which is moved into the checkpoint.
    """
    plain, tensors = split(state)
    return Copy(step, tick, topology, plain, tensors, score, shards)


def write(taken: Copy, folder: Path) -> Checkpoint:
    """Write a copy as ``<folder>/<step>``, replacing one of that step; whole or not at all, whenever the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{taken.step:09d}.{os.getpid()}"
    discard(temporary)
    temporary.mkdir()
    state = json.dumps(taken.plain, separators=(",", ":"), allow_nan=False).encode()
    parts = {} if taken.shards is None else _move_in(taken.shards, temporary)
    parts |= {TENSORS: write_tensors(temporary / TENSORS, taken.tensors), STATE: write_bytes(temporary / STATE, [state])}
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "esper": esper.__version__,
        "step": taken.step,
        "tick": taken.tick,
        "score": taken.score,
        "saved": round(time.time(), 3),
        "topology": taken.topology,
        "parts": {name: part.card() for name, part in parts.items()},
    }
    manifest["sha256"] = _own_digest(manifest)
    write_bytes(temporary / MANIFEST, [json.dumps(manifest).encode()])
    fsync_folder(temporary)
    target = folder / f"{taken.step:09d}"
    _throw_away(target)
    os.rename(temporary, target)
    fsync_folder(folder)
    return Checkpoint(target, manifest)


def _move_in(shards: Path, temporary: Path) -> dict[str, Written]:
    refuse_missing(shards)
    os.rename(shards, temporary / SHARDS)
    files = sorted((temporary / SHARDS).iterdir())
    fsync_folder(temporary / SHARDS)
    return {f"{SHARDS}/{file.name}": written(file) for file in files}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first; not yet verified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def read_manifest(path: Path) -> Checkpoint:
    """The description of a checkpoint, in today's form. Raises UserError for one that is damaged, foreign or newer."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"its {MANIFEST} cannot be read ({_words(error)})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _refused(path, "it is not a checkpoint of esper")
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise _refused(path, "it states no schema version")
    if schema > SCHEMA:
        raise UserError(
            f"The checkpoint {path} has schema {schema}, and this esper reads up to {SCHEMA}: install the version of esper that "
            f"wrote it ({manifest.get('esper')}) or a newer one."
        )
    if manifest.get("sha256") != _own_digest(manifest) or not _typed(manifest):
        raise _refused(path, f"its {MANIFEST} is not what was written")
    try:
        return Checkpoint(path, manifest_of_today(manifest))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _refused(path, _words(error)) from error


def _typed(manifest: dict[str, Any]) -> bool:
    score, saved = manifest.get("score"), manifest.get("saved")
    counts = all(type(manifest.get(name)) is int and manifest[name] >= 0 for name in ("step", "tick"))
    return counts and isinstance(score, (float, int, type(None))) and isinstance(saved, (float, int))


def read(path: Path) -> tuple[Checkpoint, Any]:
    """(description, state). Raises UserError for a checkpoint that is damaged, truncated, foreign or newer.

    The tensors lie in the file's own memory (``files.map_bytes``): copy those that are kept, with ``tree.kept``. In the place of those
    that were sharded among processes are notes, which ``shards.put_in`` reads.
    """
    checkpoint = read_manifest(path)
    try:
        stated = {name: Written.of_card(checkpoint.manifest["parts"][name]) for name in (STATE, TENSORS)}
        plain = json.loads(read_bytes(path / STATE, stated[STATE]))
        state = join(plain, parse_tensors(map_bytes(path / TENSORS, stated[TENSORS])))
        state = state_of_today(state, checkpoint.manifest["schema"])
        sharded = [name for name in checkpoint.manifest["parts"] if name.startswith(f"{SHARDS}/")]
        for name in sharded:
            map_bytes(path / SHARDS / Path(name).name, Written.of_card(checkpoint.manifest["parts"][name]))
        state = locate(state, path.resolve() / SHARDS) if sharded else state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refused(path, _words(error)) from error
    return checkpoint, state


def newest(folder: Path) -> tuple[Checkpoint, Any, list[str]] | None:
    """The newest complete checkpoint, and why newer ones were passed over; None where there is none."""
    refusals: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return (*read(path), refusals)
        except UserError as error:
            refusals.append(str(error))
    if refusals:
        raise UserError(f"None of the {len(refusals)} checkpoints in {folder} can be used. {refusals[0]}")
    return None


def retain(folder: Path, keep: int, best: int, hours: float) -> list[Path]:
    """Delete all checkpoints but the newest ``keep``, the ``best`` by score, and those younger than ``hours``.

    Of equal scores the earliest is the best: between two validations every checkpoint has the score of the one before.
    """
    known: list[Checkpoint] = []
    for path in checkpoints(folder):
        try:
            known.append(read_manifest(path))
        except UserError as error:
            if not _out_of_reach(error):
                _throw_away(path)
    kept = {checkpoint.path for checkpoint in known[-keep:]}
    scored = [checkpoint for checkpoint in known if checkpoint.manifest["score"] is not None]
    scored.sort(key=lambda checkpoint: (-checkpoint.manifest["score"], checkpoint.step))
    kept |= {checkpoint.path for checkpoint in scored[:best]}
    kept |= {checkpoint.path for checkpoint in known if time.time() - checkpoint.manifest["saved"] < hours * 3600.0}
    gone = [checkpoint.path for checkpoint in known if checkpoint.path not in kept]
    for path in gone:
        _throw_away(path)
    return gone


def _out_of_reach(error: UserError) -> bool:
    """Whether the failure to read a manifest may be temporary, such as an unmounted share, and so is no sign of damage."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, (FileNotFoundError, IsADirectoryError))


def forget_after(folder: Path, step: int) -> None:
    """Delete checkpoints of later steps, because the run continues from ``step`` or starts over (−1)."""
    for path in checkpoints(folder):
        if int(path.name) > step:
            _throw_away(path)


def sweep_out(folder: Path) -> None:
    """Delete leftovers of a killed process that was writing or deleting."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith("."):
                discard(path)


def _own_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _throw_away(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that nobody finds half of it."""
    if path.exists():
        away = path.parent / f".{path.name}.{os.getpid()}.gone"
        discard(away)
        os.rename(path, away)
        discard(away)


def discard(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"The checkpoint {path} cannot be used: {why}; resume from an earlier one (resume=auto does) or start anew.")


def _words(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".") or type(error).__name__
