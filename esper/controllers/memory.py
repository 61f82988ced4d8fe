"""What controllers have learnt, from run to run: in a file that runs add to, or with the runs of an MLflow experiment.

Kept are the sums that a posterior rests on, so the memory of several runs is the sum of theirs, in whatever order they end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from esper.atomic_files import replacing
from esper.controllers.posterior import Evidence
from esper.errors import UserError

FILE = "controller_evidence.json"
"""In a run's folder: what that run alone has learnt."""
MOST_RUNS = 500
"""The newest runs of an experiment that are remembered."""


def read_file(path: str | Path) -> Evidence:
    """The evidence in a memory file, none where there is no file yet. Raises UserError where it cannot be read or written."""
    place = Path(path)
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise UserError(f"controller.memory={path}: there is no folder {place.parent} that could be written to; make it, or name another.")
    return _read(place)[0] if place.exists() else Evidence()


def add_to_file(path: str | Path, evidence: Evidence) -> None:
    """Add what a run has learnt to a memory file. Several runs may end at once.

    The same evidence is not added twice: a run that repeats another one, or is resumed at its end, has learnt nothing new.
    """
    place = Path(path)
    with (place.parent / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known, runs = _read(place) if place.exists() else (Evidence(), [])
        if not evidence.n or _digest(evidence) in runs:
            return
        known.merge(evidence)
        write(place, known, [*runs, _digest(evidence)])


def _digest(evidence: Evidence) -> str:
    return hashlib.sha256(json.dumps(evidence.state()).encode()).hexdigest()[:16]


def keep(controller: Any, memory: str, folder: Path, tick: int) -> None:
    """Write what a controller has learnt by ``tick``, the run's end, into the run's folder, and add it to a memory file."""
    evidence = controller.evidence(tick)
    write(folder / FILE, evidence, [_digest(evidence)])
    if memory.endswith(".json"):
        add_to_file(memory, evidence)


def write(path: Path, evidence: Evidence, runs: list[str]) -> None:
    """A memory file, whole or not at all; ``runs`` are digests of what each run has added."""
    with replacing(path) as aside:
        aside.write_text(json.dumps({"runs": runs, "evidence": evidence.state()}))


def _read(path: Path) -> tuple[Evidence, list[str]]:
    try:
        saved = json.loads(path.read_text())
        return Evidence.from_state(saved["evidence"]), [str(run) for run in saved["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"controller.memory={path} holds no controller's memory ({type(error).__name__}: {error}); name another file."
        ) from error


def read_experiment(uri: str, name: str) -> Evidence:
    """The evidence of the finished runs of an MLflow experiment, none where there is no such experiment yet."""
    from esper.tracking.mlflow_store import quiet_client

    client = quiet_client(uri)
    found, together = client.get_experiment_by_name(name), Evidence()
    if found is None:
        return together
    runs: list[Any] = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'", max_results=MOST_RUNS)
    with tempfile.TemporaryDirectory() as folder:
        for run in sorted(runs, key=lambda one: (one.info.start_time, one.info.run_id)):
            if any(entry.path == FILE for entry in client.list_artifacts(run.info.run_id)):
                together.merge(_read(Path(client.download_artifacts(run.info.run_id, FILE, folder)))[0])
    return together
