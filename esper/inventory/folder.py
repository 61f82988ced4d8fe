"""Runs and sweeps in the outputs folder, read from the files that they left. Ten thousand take about a second."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from esper.compare.sweep.resume import LOCK as SWEEP_LOCK
from esper.compare.sweep.resume import NOTE as SWEEP_NOTE
from esper.errors import UserError
from esper.inventory.entries import DAMAGED, JOB, RUN, RUNNING, STOPPED, SWEEP, UNKNOWN, Entry, total
from esper.report.summary_file import NAME as SUMMARY
from esper.running.run_folder import LOCK, status, try_lock

JOB_NOTE, PLAN, COMPARISON = "job.json", "plan.json", "comparison.json"
ASIDE = ".attempt"  # and a number: a folder with an earlier attempt of a job
DEEPEST = 5  # folders below the outputs: sweeps/<day>/<sweep>/tuning/<job>
NO_RUNS = ("mlflow-artifacts", "controls", "compare")  # folders of the outputs in which no run lives
MARKS = (SUMMARY, LOCK, JOB_NOTE)  # any of them makes a folder a run's


class _Metrics(msgspec.Struct):
    final: dict[str, float | None] = {}


class _Seconds(msgspec.Struct):
    total: float | None = None


class _Summary(msgspec.Struct):
    """The part of ``summary.json`` that a list needs: the rest is skipped, not decoded."""

    name: str = ""
    status: str = ""
    primary: str = ""
    seed: int | None = None
    metrics: _Metrics = msgspec.field(default_factory=_Metrics)
    seconds: _Seconds = msgspec.field(default_factory=_Seconds)
    macs: float | None = None


class _JobNote(msgspec.Struct):
    status: str = ""
    error: str = ""
    arm: str = ""
    block: str = ""
    seconds: float = math.nan


class _SweepNote(msgspec.Struct):
    id: str = ""
    name: str = ""
    parent: str = ""
    ended: bool = False


class _Plan(msgspec.Struct):
    metric: str = ""
    arms: dict[str, msgspec.Raw] = {}
    seeds: list[msgspec.Raw] = []
    blocks: list[str] = []


class _Verdict(msgspec.Struct):
    arm: str = ""
    block: str = ""
    verdict: str = ""


class _Comparison(msgspec.Struct):
    verdicts: list[_Verdict] = []


_summary = msgspec.json.Decoder(_Summary)
_job = msgspec.json.Decoder(_JobNote)


@dataclass(frozen=True)
class Found:
    """A folder that belongs to a run or a sweep: ``kind`` is one of KINDS; ``attempt`` marks one that a sweep has set aside."""

    kind: str
    path: Path
    files: frozenset[str]
    sweep: Path | None = None
    attempt: bool = False


def walk(output: Path) -> Iterator[Found]:
    """Every run's and sweep's folder below ``output``, a sweep before its jobs; links are not followed.

    Raises:
        UserError: ``output`` cannot be read.
    """
    try:
        os.scandir(output).close()
    except OSError as error:
        raise UserError(f"{output} cannot be read ({str(error.strerror).lower()}); name the folder of all outputs: output=….") from error
    waiting: list[tuple[str, int, Path | None, bool]] = [(str(output), 0, None, False)]
    while waiting:
        place, depth, sweep, attempt = waiting.pop()
        files, folders = _listed(place)
        path = Path(place)
        if SWEEP_NOTE in files:
            sweep = path
            yield Found(SWEEP, path, files)
        elif any(mark in files for mark in MARKS):
            yield Found(JOB if sweep else RUN, path, files, sweep, attempt)
            continue
        if depth < DEEPEST:
            names = sorted(folders, reverse=True)
            inside = [name for name in names if not name.startswith(".") and not (depth == 0 and name in NO_RUNS)]
            waiting += [(f"{place}/{name}", depth + 1, sweep, attempt or ASIDE in name) for name in inside]


def _listed(place: str) -> tuple[frozenset[str], list[str]]:
    """Names of files and of folders; none where the folder may not be read or has gone."""
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(place) as entries:
            for one in entries:
                (folders if one.is_dir(follow_symlinks=False) else files).append(one.name)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ENOENT, errno.ENOTDIR):
            raise
    return frozenset(files), folders


def entries(output: Path) -> list[Entry]:
    """All runs, jobs and sweeps below ``output``; attempts that a sweep has set aside are not among them."""
    found: list[Entry] = []
    sweeps: dict[Path, tuple[Entry, list[Entry]]] = {}
    for one in walk(output):
        if one.kind == SWEEP:
            sweep = sweep_entry(one)
            sweeps[one.path] = (sweep, [])
            found.append(sweep)
        elif not one.attempt:
            entry = run_entry(one)
            if one.sweep is not None:
                sweep, jobs = sweeps[one.sweep]
                entry.sweep = sweep.id
                jobs.append(entry)
            found.append(entry)
    for sweep, jobs in sweeps.values():
        _sum_up(sweep, jobs)
    return found


def run_entry(found: Found) -> Entry:
    """The entry of one run; one whose files cannot be read is DAMAGED."""
    path = found.path
    entry = Entry(found.kind, path.name, path.name, "NEW", 0.0, path)
    try:
        told, entry.changed = _of_summary(found)
        note = _job.decode((path / JOB_NOTE).read_bytes()) if JOB_NOTE in found.files else _JobNote()
        entry.status = status(path) if LOCK in found.files else "FAILED" if note.error else told.status or "NEW"
    except (msgspec.MsgspecError, ValueError, FileNotFoundError):  # damaged, or removed since
        return replace(entry, status=DAMAGED)
    except PermissionError:  # of another user: the lock cannot be tried
        return replace(entry, status=UNKNOWN)
    entry.metric = told.primary.replace("validation/", "test/", 1)
    final = told.metrics.final
    values = (final.get(name) for name in (entry.metric, told.primary))
    entry.value = next((value for value in values if value is not None), math.nan)
    entry.macs = math.nan if told.macs is None else told.macs
    entry.seconds = math.nan if told.seconds.total is None else told.seconds.total
    seed = "" if told.seed is None else f"seed={told.seed}"
    parts = (note.arm, note.block, seed) if note.arm or note.block else (told.name, seed)
    entry.name = " ".join(filter(None, parts)) or path.name
    entry.arms = (note.arm,) if note.arm else ()
    return entry


def _of_summary(found: Found) -> tuple[_Summary, float]:
    """What the summary tells, and when the run last wrote one of the files that mark its folder."""
    path = found.path / next(mark for mark in MARKS if mark in found.files)
    if SUMMARY not in found.files:
        return _Summary(), os.stat(path).st_mtime
    with open(path, "rb") as file:
        return _summary.decode(file.read()), os.fstat(file.fileno()).st_mtime


def sweep_entry(found: Found) -> Entry:
    """The entry of a sweep without its jobs; one whose note cannot be read is DAMAGED."""
    path = found.path
    entry = Entry(SWEEP, path.name, path.name, STOPPED, (path / SWEEP_NOTE).stat().st_mtime, path)
    try:
        note = msgspec.json.decode((path / SWEEP_NOTE).read_bytes(), type=_SweepNote)
        plan = msgspec.json.decode((path / PLAN).read_bytes(), type=_Plan) if PLAN in found.files else _Plan()
        judged = msgspec.json.decode((path / COMPARISON).read_bytes(), type=_Comparison) if COMPARISON in found.files else _Comparison()
    except (msgspec.MsgspecError, ValueError):
        return replace(entry, status=DAMAGED)
    entry.id, entry.name, entry.store_id = note.id or path.name, note.name or path.name, note.parent
    entry.arms, entry.metric = tuple(plan.arms), plan.metric
    entry.jobs = len(plan.arms) * len(plan.seeds) * len(plan.blocks or [""])
    entry.verdict = in_words([(f"{one.arm} {one.block}".strip(), one.verdict) for one in judged.verdicts])
    entry.status = RUNNING if is_swept(path) else "FINISHED" if note.ended else STOPPED
    return entry


def is_swept(folder: Path) -> bool:
    """Whether a process runs the sweep in ``folder`` now."""
    path = folder / SWEEP_LOCK
    if not path.exists():
        return False
    try:
        with path.open("a") as file:
            return not try_lock(file)
    except PermissionError:
        return False


def in_words(verdicts: list[tuple[str, str]]) -> str:
    """``better`` of the one arm beside the reference, or a word for each."""
    if len(verdicts) == 1:
        return verdicts[0][1]
    return ", ".join(f"{arm}: {word}" for arm, word in verdicts)


def _sum_up(sweep: Entry, jobs: list[Entry]) -> None:
    sweep.done = sum(job.status in ("FINISHED", "FAILED") for job in jobs)
    sweep.jobs = max(sweep.jobs, len(jobs))
    sweep.macs, sweep.seconds = total([job.macs for job in jobs]), total([job.seconds for job in jobs])
    sweep.changed = max([sweep.changed, *(job.changed for job in jobs)])
    if sweep.status == STOPPED and any(job.status == "FAILED" for job in jobs) and sweep.done == sweep.jobs:
        sweep.status = "FAILED"
