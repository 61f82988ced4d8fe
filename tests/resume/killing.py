"""Runs in processes of their own, killed with SIGKILL at a given moment, resumed, and compared with an undisturbed run.

Children are forked from a process that has imported everything already, so that a moment is a moment of the run.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.checkpoint import disk
from esper.cli.resume import resume
from esper.config import RootConfig
from esper.report.summary_file import read_summary
from esper.running.run import run

TIMED = ("seconds", "output", "environment", "environments", "bus")
LISTS = ("metrics.csv", "events.jsonl", "weights.csv")
TABLES = ("metrics", "transitions", "gates", "seeds")


@dataclass
class Child:
    """A forked process; ``seconds`` is how long it lived, ``code`` its exit code, −9 when it was killed."""

    code: int
    seconds: float


def child(work: Callable[[], None], log: Path, kill_after_s: float | None = None, kill_when: Callable[[], bool] = lambda: False) -> Child:
    """Do ``work`` in a forked process whose output goes to ``log``; kill it after so many seconds, or when something is so."""
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _be_child(work, log)
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        lived = time.monotonic() - began
        if found:
            return Child(os.waitstatus_to_exitcode(status), lived)
        if (kill_after_s is not None and lived >= kill_after_s) or kill_when():
            os.kill(process, signal.SIGKILL)
            return Child(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), lived)
        time.sleep(0.002)


def _be_child(work: Callable[[], None], log: Path) -> None:
    """Never returns: the code of whoever forked us must not run twice."""
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Place:
    """Where a process dies by its own hand: at the ``number``-th call of ``owner.name``, before it does anything or when it is through."""

    owner: Any
    name: str
    number: int = 1
    after: bool = False

    def trap(self) -> None:
        """Set it, in the process that is to die; the product knows nothing of it."""
        original, calls = getattr(self.owner, self.name), itertools.count(1)

        def deadly(*arguments: Any, **more: Any) -> Any:
            due = next(calls) == self.number
            if due and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **more)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, deadly)


def reached(folder: Path, step: int) -> Callable[[], bool]:
    """Whether the run in a folder has a checkpoint of that step or a later one."""
    return lambda: any(int(kept.name) >= step for kept in disk.checkpoints(folder / disk.FOLDER))


def start(config: RootConfig, folder: Path) -> None:
    """A run from its beginning."""
    run(config, folder, quiet=True)


def go_on(config: RootConfig, folder: Path) -> None:
    """The run that was killed in ``folder``; one killed before it had written its config begins again."""
    if not (folder / "config.yaml").exists():
        return start(config, folder)
    begun = resume(folder, fall_back=True)
    run(begun.config, begun.folder, quiet=True, state=begun.state)


def ended(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end."""
    return not (folder / "run.lock").exists() and (folder / "summary.json").exists()


def differences(folder: Path, reference: Path) -> list[str]:
    """What the run in ``folder`` left otherwise than the one in ``reference``, but for what a clock said."""
    found = []
    a, b = read_summary(folder), read_summary(reference)
    for key in sorted({*a, *b}):
        if key not in TIMED and a.get(key) != b.get(key):
            found.append(f"summary {key}: {a.get(key)} and {b.get(key)}")
    found += [f"{name}.parquet" for name in TABLES if rows(folder / f"{name}.parquet") != rows(reference / f"{name}.parquet")]
    found += [name for name in LISTS if lines(folder / name) != lines(reference / name)]
    if (folder / ".parts").exists():
        found.append("parts of Parquet files are left over")
    return found


def rows(path: Path) -> list[str]:
    """The rows of a table as text, in their order, without the values that a clock gave."""
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return [repr({**row, "value": 0.0} if "second" in str(row.get("name", "")) else row) for row in table]


def lines(path: Path) -> list[str]:
    """The lines of one of ``LISTS``, without what a clock or the number of lives has a part in; none without a file."""
    if not path.exists():
        return []
    every = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".csv":
        return [line.rpartition(",")[0] if "second" in line else line for line in every]
    return [line for line in every if json.loads(line)["kind"] not in ("RunStarted", "Checkpoint", "RunEnded")]


def different_histories(output: Path, reference: Path) -> list[str]:
    """In what the MLflow stores of two output folders differ: each must hold one run, finished, with the same metrics."""
    a, b = history(output), history(reference)
    return [f"the MLflow history of {name}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def history(output: Path) -> dict[str, Any]:
    """(step, timestamp since the run began, value) of every metric of the MLflow run, without the values that a clock gave.

    Under ``runs``: how each run of the store ended.
    """
    from esper.tracking.mlflow_store import quiet_client

    client = quiet_client(f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    found: dict[str, Any] = {"runs": [run.info.status for run in runs]}
    for only in runs[:1]:
        for name in only.data.metrics:
            points = client.get_metric_history(only.info.run_id, name)
            since = only.info.start_time
            found[name] = sorted((p.step, p.timestamp - since, 0.0 if "second" in name else p.value) for p in points)
    return found
