"""Reading runs from an MLflow store: a SQLite file directly, any other store or server through MLflow's client.

The direct way is not only faster, without the seconds of MLflow's import and of its objects: it opens the file for reading alone, so
that a look at a store neither makes one nor brings another version's tables up to date.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from esper.errors import UserError
from esper.tracking.config import sqlite_file

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

OTHERWISE = "or name the folder of another with output=…"
PAGE = 200  # runs a request: a busy server takes its time over each
LOCKED_S = 60.0  # how long a read waits for a writer
LARGEST = 1.797e308  # MLflow keeps infinity as the largest number of its databases
Point = tuple[str, int, float]  # run, step, value


@dataclass(frozen=True)
class StoredRun:
    """A run of an MLflow store. Times are milliseconds since 1970, None where there is none; ``metrics`` are last values."""

    id: str
    name: str
    status: str
    experiment: str
    start: int | None = None
    end: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class MlflowReader(Protocol):
    """What both ways of reading give; ``curves`` is the number of runs up to which reading histories takes no time to speak of."""

    curves: int

    def experiments(self) -> dict[str, str]:
        """Names by id, without deleted ones."""

    def runs(
        self,
        experiments: Sequence[str],
        tag: tuple[str, str] | None = None,
        metrics: Collection[str] | None = None,
        texts: Collection[str] | None = None,
    ) -> list[StoredRun]:
        """The runs that were not deleted, the newest first; those with this tag alone where it is given.

        ``metrics`` and ``texts`` (parameters and tags) name the values that they come with; without them it is all.
        """

    def metric_names(self, experiments: Sequence[str]) -> list[str]:
        """The names of all metrics that any run has, sorted."""

    def history(self, metric: str, runs: Sequence[str]) -> list[Point]:
        """Every value of a metric, run by run and step by step; of a step that was logged twice the later."""


@contextmanager
def reading(uri: str, key: str = "uri") -> Iterator[MlflowReader]:
    """A reader of the store at ``uri``, which the setting ``key`` named; an error while it is used becomes a sentence.

    A server that is there but does not answer is given up after a minute, where MLflow would try for a quarter of an
    hour; its own environment variables win.

    Raises:
        UserError: the store cannot be read.
    """
    file = sqlite_file(uri)
    if file is not None:
        with _reading_file(file, uri, key) as reader:
            yield reader
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from esper.tracking.mlflow_store import quiet_client

    try:
        yield ClientReader(quiet_client(uri, key, OTHERWISE))
    except (MlflowException, SQLAlchemyError, requests.RequestException, ImportError) as error:
        raise _unreadable(uri, key, (str(error).splitlines() or [type(error).__name__])[0][:200]) from error


@contextmanager
def _reading_file(file: Path, uri: str, key: str) -> Iterator[MlflowReader]:
    try:
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=LOCKED_S)) as opened:
            yield SqliteReader(opened)
    except sqlite3.Error as error:
        raise _unreadable(uri, key, str(error)) from error


def _unreadable(uri: str, key: str, reason: str) -> UserError:
    return UserError(f"The store at {uri} cannot be read: {reason.rstrip('. ')}; see that it runs, or name another with {key}=….")


class SqliteReader:
    """Reads the tables of MLflow's database: https://mlflow.org/docs/latest/tracking/backend-stores.html."""

    curves = 1_000

    def __init__(self, opened: sqlite3.Connection) -> None:
        self.opened = opened

    def experiments(self) -> dict[str, str]:
        """Names by id."""
        rows = self.opened.execute("SELECT experiment_id, name FROM experiments WHERE lifecycle_stage = 'active'")
        return {str(number): name for number, name in rows}

    def runs(
        self,
        experiments: Sequence[str],
        tag: tuple[str, str] | None = None,
        metrics: Collection[str] | None = None,
        texts: Collection[str] | None = None,
    ) -> list[StoredRun]:
        """The runs, the newest first."""
        chosen, values = self._chosen(experiments, tag)
        found = {
            row[0]: StoredRun(row[0], row[1] or "", row[2], str(row[3]), row[4], row[5])
            for row in self.opened.execute(
                f"SELECT run_uuid, name, status, experiment_id, start_time, end_time {chosen} ORDER BY start_time DESC, r.rowid",
                values,
            )
        }
        wanted = "" if texts is None else f"t.key IN ({', '.join('?' * len(texts))}) AND "
        for table in ("params", "tags"):
            for run, key, value in self.opened.execute(
                f"SELECT t.run_uuid, t.key, t.value FROM {table} t WHERE {wanted} t.run_uuid IN (SELECT r.run_uuid {chosen})",
                [*(texts or ()), *values],
            ):
                getattr(found[run], table)[key] = value
        wanted = "" if metrics is None else f"m.key IN ({', '.join('?' * len(metrics))}) AND "
        for run, key, value, missing in self.opened.execute(
            f"SELECT m.run_uuid, m.key, m.value, m.is_nan FROM latest_metrics m WHERE {wanted} m.run_uuid IN (SELECT r.run_uuid {chosen})",
            [*(metrics or ()), *values],
        ):
            found[run].metrics[key] = _number(value, missing)
        return list(found.values())

    def _chosen(self, experiments: Sequence[str], tag: tuple[str, str] | None) -> tuple[str, list[str | int]]:
        """The rest of a query that chooses the runs, with its values."""
        ids = [int(one) for one in experiments]
        query = f"FROM runs r WHERE r.lifecycle_stage = 'active' AND r.experiment_id IN ({', '.join('?' * len(ids))})"
        if tag is None:
            return query, [*ids]
        return f"{query} AND r.run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = ?)", [*ids, *tag]

    def metric_names(self, experiments: Sequence[str]) -> list[str]:
        """The names of all metrics."""
        chosen, values = self._chosen(experiments, None)
        rows = self.opened.execute(f"SELECT DISTINCT key FROM latest_metrics WHERE run_uuid IN (SELECT r.run_uuid {chosen})", values)
        return sorted(row[0] for row in rows)

    def history(self, metric: str, runs: Sequence[str]) -> list[Point]:
        """Every value of a metric."""
        found: list[Point] = []
        for run in runs:
            rows = self.opened.execute(
                "SELECT step, value, is_nan FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step, timestamp", (run, metric)
            )
            found += ((run, step, value) for step, value in {step: _number(value, nan) for step, value, nan in rows}.items())
        return found


def _number(value: float, missing: bool) -> float:
    if missing:
        return math.nan
    return math.copysign(math.inf, value) if abs(value) > LARGEST else float(value)


class ClientReader:
    """Reads through MLflow's client, so any store and server that it knows."""

    curves = 50

    def __init__(self, client: MlflowClient) -> None:
        self.client = client

    def experiments(self) -> dict[str, str]:
        """Names by id."""
        found: dict[str, str] = {}
        token = None
        while True:
            page = self.client.search_experiments(max_results=PAGE, page_token=token)
            found |= {str(one.experiment_id): one.name for one in page}
            token = page.token
            if not token:
                return found

    def runs(
        self,
        experiments: Sequence[str],
        tag: tuple[str, str] | None = None,
        metrics: Collection[str] | None = None,
        texts: Collection[str] | None = None,
    ) -> list[StoredRun]:
        """The runs, the newest first; a server sends all values of a run."""
        query = "" if tag is None else f"tags.`{tag[0]}` = '{tag[1]}'"
        found: list[StoredRun] = []
        token = None
        while True:
            page = self.client.search_runs(list(experiments), query, max_results=PAGE, page_token=token)
            found += (_stored(run, metrics, texts) for run in page)
            token = page.token
            if not token:
                return found

    def metric_names(self, experiments: Sequence[str]) -> list[str]:
        """The names of all metrics."""
        return sorted({name for run in self.runs(experiments) for name in run.metrics})

    def history(self, metric: str, runs: Sequence[str]) -> list[Point]:
        """Every value of a metric, asked for run by run."""
        found: list[Point] = []
        for run in runs:
            values = sorted(self.client.get_metric_history(run, metric), key=lambda one: (one.step, one.timestamp))
            found += ((run, step, value) for step, value in {one.step: _number(one.value, False) for one in values}.items())
        return found


def _stored(run: Run, metrics: Collection[str] | None, texts: Collection[str] | None) -> StoredRun:
    kept = {name: _number(value, False) for name, value in run.data.metrics.items() if metrics is None or name in metrics}
    params, tags = (
        {name: text for name, text in told.items() if texts is None or name in texts} for told in (run.data.params, run.data.tags)
    )
    info = run.info
    return StoredRun(
        id=info.run_id,
        name=info.run_name or "",
        status=info.status,
        experiment=str(info.experiment_id),
        start=info.start_time,
        end=info.end_time,
        params=params,
        tags=tags,
        metrics=kept,
    )
