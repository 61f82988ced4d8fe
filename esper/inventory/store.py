"""esper's runs and sweeps in an MLflow store: the names that they have there, and those whose folders are gone or elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

from esper.compare.sources.mlflow_reader import StoredRun, reading
from esper.inventory.entries import JOB, RUN, STOPPED, SWEEP, Entry

RUN_TAG, FOLDER_TAG, SWEEP_TAG, KIND_TAG, ARM_TAG, VERDICT_TAG = (
    "esper.run",
    "esper.folder",
    "esper.sweep",
    "esper.kind",
    "arm",
    "verdict",
)
TEXTS = (RUN_TAG, FOLDER_TAG, SWEEP_TAG, KIND_TAG, ARM_TAG, VERDICT_TAG)
MACS, SECONDS = "cost/macs", "cost/seconds"
NOTE = "mlflow.json"
DECIDING = "0_main/test_"  # the deciding metric on the test set; its name follows


def add_stored(found: list[Entry], uri: str, key: str) -> list[Entry]:
    """``found``, whose folders are absolute, with the names of the store, and behind it the runs that the store alone has.

    ``key`` is the setting that named the store.

    Raises:
        UserError: the store cannot be read.
    """
    with reading(uri, key) as reader:
        experiments = list(reader.experiments())
        deciding = [name for name in reader.metric_names(experiments) if name.startswith(DECIDING)]
        stored = reader.runs(experiments, metrics=[*deciding, MACS, SECONDS], texts=TEXTS)
    ours = [one for one in stored if RUN_TAG in one.tags or one.tags.get(KIND_TAG) == "sweep"]
    places = {one.tags.get(FOLDER_TAG, ""): one for one in reversed(ours)}  # of a folder's runs the newest, which comes first
    ids = {one.id: one for one in ours}
    taken: set[str] = set()
    for entry in found:
        if entry.folder is None:
            continue
        one = places.get(str(entry.folder)) or ids.get(entry.store_id or _noted(entry.folder))
        if one is not None:
            entry.name, entry.store_id = one.name or entry.name, one.id
            entry.arms = entry.arms or ((one.tags[ARM_TAG],) if one.tags.get(ARM_TAG) else ())
            taken.add(one.id)
    others = [entry_of(one) for one in ours if one.id not in taken]
    _count_jobs(others)
    return found + others


def _noted(folder: Path) -> str:
    """The run in the store that a folder names, for a folder that was moved since; empty where it names none."""
    try:
        return str(json.loads((folder / NOTE).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def entry_of(one: StoredRun) -> Entry:
    """A run that the store alone has; ``status`` is the store's, in which a process that died is RUNNING for ever."""
    sweep = one.tags.get(SWEEP_TAG, "")
    kind = SWEEP if one.tags.get(KIND_TAG) == "sweep" else JOB if sweep else RUN
    name, value = next(((n, v) for n, v in one.metrics.items() if n.startswith(DECIDING)), ("", math.nan))
    return Entry(
        kind=kind,
        id=sweep if kind == SWEEP else one.tags.get(RUN_TAG, one.id),
        name=one.name,
        status=STOPPED if kind == SWEEP and one.status == "KILLED" else one.status,
        changed=(one.end or one.start or 0) / 1000,
        arms=(one.tags[ARM_TAG],) if one.tags.get(ARM_TAG) else (),
        metric=f"test/{name.removeprefix(DECIDING)}" if name else "",
        value=value,
        verdict=one.tags.get(VERDICT_TAG, ""),
        macs=one.metrics.get(MACS, math.nan),
        seconds=one.metrics.get(SECONDS, math.nan),
        sweep="" if kind == SWEEP else sweep,
        store_id=one.id,
    )


def _count_jobs(others: list[Entry]) -> None:
    sweeps = {entry.id: entry for entry in others if entry.kind == SWEEP}
    arms: dict[str, dict[str, None]] = {}
    for job in others:
        if job.kind == JOB and (sweep := sweeps.get(job.sweep)) is not None:
            sweep.jobs += 1
            sweep.done += job.status in ("FINISHED", "FAILED")
            for name in ("macs", "seconds"):
                both = [value for value in (getattr(sweep, name), getattr(job, name)) if math.isfinite(value)]
                setattr(sweep, name, sum(both) if both else math.nan)
            arms.setdefault(job.sweep, {}).update(dict.fromkeys(job.arms))
    for id, names in arms.items():
        sweeps[id].arms = tuple(sorted(names))


def store_of(output: Path, uri: str) -> tuple[str, str]:
    """The store to read and the setting that names it: ``uri``, else the file in the outputs folder; empty where there is none."""
    from esper.tracking.config import sqlite_uri

    if uri:
        return uri, "uri"
    file = output / "mlflow.db"
    return (sqlite_uri(file.resolve()), "output") if file.is_file() else ("", "")
