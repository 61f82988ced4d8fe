"""The store behind an MLflow run: checked before training, opened, its experiment found; every refusal is a sentence.

``check_store`` does without the seconds that importing MLflow takes; everything else is for the process that MLflow lives in.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import shlex
import socket
import sqlite3
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from esper import secrets
from esper.errors import UserError
from esper.tracking.config import MlflowConfig, sqlite_file, sqlite_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

KIND = {"mlflow.experimentKind": "custom_model_development"}  # or MLflow's page opens on prompts, traces and judges
TURN_S = 60  # a sweep's processes share one sqlite file, each waits its turn
#: Driver that SQLAlchemy asks for → its package, where their names differ.
PACKAGES = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
OTHERWISE = "or choose tracking=csv"
MAGIC = b"SQLite format 3\x00"  # https://www.sqlite.org/fileformat.html, first 16 bytes
CHECKED = 256 << 20  # bytes of a store that are read through before a run: half a second's worth
ANSWER_S = 5.0  # how long a server or a locked file may take to answer
#: Schemes that MLflow itself opens, besides those of installed plugins.
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def check_store(config: MlflowConfig, outputs: str) -> None:
    """Refuse a server that does not answer, a file that is not a database, and a URI for which MLflow has no store.

    Raises:
        UserError: naming the URI and the remedy.
    """
    check_uri(tracking_uri(config, outputs), "tracking.uri", OTHERWISE)


def check_uri(uri: str, key: str, otherwise: str) -> None:
    """Check a URI that the user gave as ``key``; ``otherwise`` is the alternative that the error message offers.

    Raises:
        UserError: naming the URI and the remedy.
    """
    secrets.check(key, uri)
    scheme = uri.partition("://")[0].partition("+")[0]
    if scheme in ("http", "https"):
        _check_server(uri, key, otherwise)
    elif (file := sqlite_file(uri)) is not None:
        _check_file(file, key, otherwise)
    elif "://" not in uri or scheme == "file":
        raise UserError(f"{key}={uri} is a folder; give sqlite:///<absolute path>.db or http(s)://<server>.")
    elif scheme not in SCHEMES and scheme not in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        raise UserError(f"{key}={uri} is of no kind that MLflow knows; give sqlite:///<absolute path>.db or http(s)://<server>.")


def _check_server(uri: str, key: str, otherwise: str) -> None:
    parts = urlsplit(uri)
    try:
        tcp_port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", tcp_port), ANSWER_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={uri} does not answer ({str(reason).lower()}); start the server (mlflow server), {otherwise}.") from error


def _check_file(path: Path, key: str, otherwise: str) -> None:
    if not path.exists():
        return
    if not os.access(path, os.W_OK):
        raise UserError(f"The MLflow store {path} cannot be written; get the right to, give another {key}, {otherwise}.")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head not in (b"", MAGIC) or _damaged(path):
        raise UserError(f"The MLflow store {path} is damaged or no SQLite database; move it away, give another {key}, {otherwise}.")


def _damaged(path: Path) -> bool:
    """Whether SQLite finds the file damaged. Large files are read in part only; a file in use is left to MLflow."""
    question = "PRAGMA quick_check(1)" if path.stat().st_size <= CHECKED else "SELECT count(*) FROM sqlite_master"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=ANSWER_S)) as store:
            answer = store.execute(question).fetchone()
    except sqlite3.OperationalError:  # locked, or a journal to be rolled back, which needs the right to write
        return False
    except sqlite3.DatabaseError:
        return True
    return question.startswith("PRAGMA") and answer != ("ok",)


def quiet_client(uri: str, key: str = "tracking.uri", otherwise: str = OTHERWISE) -> MlflowClient:
    """A client of the store at ``uri`` that prints nothing and makes no other connection; ``key`` and ``otherwise`` as in ``check_uri``.

    Raises:
        UserError: a folder, which MLflow 3 no longer writes; a database whose driver is missing or that cannot be opened.
    """
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(f"{key}={uri} is a folder; give sqlite:///<absolute path>.db or http(s)://<server>")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    file = sqlite_file(uri)
    if file is not None:
        with contextlib.suppress(OSError):  # opening the file will say why
            file.parent.mkdir(parents=True, exist_ok=True)
    import mlflow  # noqa: F401  its import sets up logging, which is then turned down
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not uri.startswith(("http://", "https://")):
        _open_once(uri, key, otherwise)
    try:
        with _alone(uri):  # two processes must not both create the tables
            if file is not None and file.exists() and not file.stat().st_size:
                _make(file)
            client = MlflowClient(patient(uri))
    except MlflowException as error:
        if "mlflow db upgrade" not in str(error):
            raise
        raise UserError(
            f"The MLflow store {_shown(uri)} was made by another version of MLflow; copy it, then run"
            f" mlflow db upgrade {shlex.quote(_shown(uri))}, {otherwise}."
        ) from error
    if file is not None and not file.exists():
        raise UserError(f"MLflow made its store elsewhere than at {file}; give another {key} or output, {otherwise}.")
    return client


def _make(file: Path) -> None:
    """Make a new store beside its place, and move it there once it is whole: whoever is killed meanwhile leaves no half of one.

    MLflow makes its tables in some seventy migrations. SQLite would wait for the disk after every step of each, which takes seconds
    where other programs write too; for a file that nobody has yet it need not.
    """
    from mlflow.tracking import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def without_waiting(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    for left in file.parent.glob(f".{glob.escape(file.name)}.*.new*"):  # by one that was killed
        left.unlink()
    new = file.with_name(f".{file.name}.{token_hex(4)}.new")
    event.listen(Engine, "connect", without_waiting)
    try:
        MlflowClient(patient(sqlite_uri(new)))
    finally:
        event.remove(Engine, "connect", without_waiting)
    with new.open("rb") as made:
        os.fsync(made.fileno())
    new.replace(file)


def _open_once(uri: str, key: str, otherwise: str) -> None:
    """Open the database, once: MLflow would try a dozen times, for minutes.

    Raises:
        UserError: its driver is missing, or it cannot be opened.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    try:
        engine = create_engine(uri)
        engine.connect().close()
        engine.dispose()
    except NoSuchModuleError:
        return  # of an MLflow plugin, which opens it in its own way
    except ImportError as error:
        name = error.name or str(error)
        raise UserError(
            f"{key}={_shown(uri)} needs the Python package {name}, which is not installed;"
            f" pip install {PACKAGES.get(name, name)}, {otherwise}."
        ) from error
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The MLflow store {_shown(uri)} cannot be opened ({reason}); see that it is there, give another {key}, {otherwise}."
        ) from error


def _shown(uri: str) -> str:
    """The URI without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if sqlite_file(uri) is not None or uri.startswith(("http://", "https://")):
        return uri
    try:
        return make_url(uri).render_as_string(hide_password=True)
    except ArgumentError:
        return uri.partition("://")[0] + "://…"


def patient(uri: str) -> str:
    """The URI of a store in SQLite with the time that a process waits for its turn.

    The driver is named where the path is written with codes: MLflow would make a folder of the path as it is written.
    """
    if sqlite_file(uri) is None or "?" in uri:
        return uri
    named = uri.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in uri else uri
    return f"{named}?timeout={TURN_S}"


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold the lock file beside a sqlite store."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    with open(f"{file}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment ``name``, made when absent; beside a sqlite store its artifacts lie in ``mlflow-artifacts``.

    Raises:
        UserError: the experiment was deleted, or the store refuses it.
    """
    import requests
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    try:
        with _alone(uri):
            found = client.get_experiment_by_name(name)
            if found is None:
                place = None if file is None else (file.resolve().parent / "mlflow-artifacts").as_uri()
                try:
                    return str(client.create_experiment(name, artifact_location=place, tags=KIND))
                except MlflowException as error:  # another process was first, perhaps on another machine
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise error
    except (MlflowException, requests.RequestException) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The MLflow store {_shown(uri)} refuses the experiment {name!r} ({reason}); see to the store, give another"
            f" tracking.uri or tracking.experiment, {OTHERWISE}."
        ) from error
    if found.lifecycle_stage == "deleted":
        command = _command(uri, "experiments restore --experiment-id", found.experiment_id)
        raise UserError(f"The MLflow experiment {name!r} was deleted; restore it ({command}), or give another: tracking.experiment=….")
    return str(found.experiment_id)


def living_run(client: MlflowClient, uri: str, run_id: str, whose: str, anew: str) -> Run:
    """The MLflow run to be continued; the error message begins with ``whose`` and offers ``anew`` as the alternative.

    Raises:
        UserError: it was deleted, in MLflow's pages or for good.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{whose} MLflow run {run_id} is no longer in {_shown(uri)}; bring back the store, {anew}.") from error
    if run.info.lifecycle_stage == "deleted":
        command = _command(uri, "runs restore --run-id", run_id)
        raise UserError(f"{whose} MLflow run {run_id} was deleted; restore it ({command}), {anew}.")
    return run


def _command(uri: str, what: str, id: str) -> str:
    return f"MLFLOW_TRACKING_URI={shlex.quote(_shown(uri))} mlflow {what} {id}"


def start_monitor(run_id: str, uri: str, interval_s: float, *, resumed: bool) -> SystemMetricsMonitor | None:
    """MLflow's own system metrics every ``interval_s`` seconds, or None for 0."""
    if interval_s <= 0:
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, interval_s, resume_logging=resumed, tracking_uri=patient(uri))
    monitor.start()
    return monitor
