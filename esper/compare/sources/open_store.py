"""``store=…``: which kind of source it is, by its address or its form."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esper.compare.sources.files import ENDINGS, read_file
from esper.compare.sources.mlflow_reader import reading
from esper.compare.sources.mlflow_runs import mlflow_runs
from esper.compare.sources.table import RunsTable
from esper.compare.sources.tensorboard import has_events, tensorboard_runs
from esper.compare.sources.trackio_files import is_trackio_database, trackio_database
from esper.errors import UserError
from esper.tracking.config import SQLITE, sqlite_file
from esper.tracking.mlflow_store import check_uri

ACCEPTED = (
    "an MLflow store (sqlite:///….db or http://…), a .csv, .tsv or .parquet file, a trackio project (.db), or a folder with event files"
)
STORE = "mlflow.db"
DATABASES = (".db", ".sqlite", ".sqlite3")


def mlflow_uri(store: str) -> str:
    """The tracking URI that ``store`` is or names by the path of its file; empty for any other source."""
    if "://" in store:
        return store
    path = Path(store)
    if path.is_dir():
        path = path / STORE
    return file_uri(path) if path.suffix in DATABASES and path.is_file() and not is_trackio_database(path) else ""


def file_uri(path: Path) -> str:
    """The tracking URI of the MLflow store in this file, or in this folder; SQLAlchemy takes ``?`` and ``%`` for signs of its own."""
    file = path / STORE if path.is_dir() else path
    return SQLITE + str(file.resolve()).replace("%", "%25").replace("?", "%3F")


@contextmanager
def opened(store: str, experiments: Sequence[str], metrics: Collection[str]) -> Iterator[RunsTable]:
    """The runs of a source; its histories can be read as long as it is open.

    Args:
        store: address or path.
        experiments: names of MLflow's experiments; other sources have none.
        metrics: names that will be asked for, in any spelling.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    with _no_database(store):
        uri = mlflow_uri(store)
    if uri:
        check_store_there(uri, "store")
        with reading(uri, "store") as reader:
            yield mlflow_runs(reader, store, experiments, metrics)
        return
    if experiments:
        raise UserError(f"experiment={experiments[0]} chooses among those of an MLflow store, and {store} is none; leave it out.")
    with _no_database(store):
        table = _of_path(Path(store))
    yield table


def _of_path(path: Path) -> RunsTable:
    if path.suffix in ENDINGS:
        return read_file(path)
    if path.is_file() and path.suffix in DATABASES:
        return trackio_database(path)
    if path.is_dir() and has_events(path):
        return tensorboard_runs(path)
    if not path.exists():
        raise UserError(f"There is nothing at store={path}; give {ACCEPTED}.")
    raise UserError(f"store={path} is no source of runs that esper knows; give {ACCEPTED}.")


@contextmanager
def _no_database(store: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise UserError(f"store={store} is no database that can be read ({error}); give {ACCEPTED}.") from error


def check_store_there(uri: str, key: str) -> None:
    """Refuse an address without a store: analysing must not make one, neither a new file nor tables in another program's.

    Raises:
        UserError: there is no store at ``uri``, which the setting ``key`` named.
    """
    check_uri(uri, key, "or name the folder of another with output=…")
    path = sqlite_file(uri)
    if path is None:
        return
    if not path.exists() or not _has_runs(path):
        raise UserError(f"There is no store at {uri}; name one with {key}=… or its folder with output=….")


def _has_runs(database: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as found:
            return bool(found.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'runs'").fetchall())
    except sqlite3.DatabaseError as error:
        raise UserError(f"The store {database} cannot be read ({error}); bring back a copy of it, or name another with uri=….") from error
