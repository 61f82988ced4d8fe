"""Whether MLflow's store can be there at all: asked before training, without the seconds that importing MLflow takes."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

from esper import secrets
from esper.errors import UserError
from esper.tracking.config import MlflowConfig, sqlite_file, tracking_uri

MAGIC = b"SQLite format 3\x00"  # https://www.sqlite.org/fileformat.html, first 16 bytes
CHECKED = 256 << 20  # bytes of a store that are read through before a run: half a second's worth
WAIT_S = 5.0
#: What MLflow itself opens, besides the schemes of installed plugins.
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def check_store(config: MlflowConfig, outputs: str) -> None:
    """Refuse a server that does not answer, a database file that is none, and what MLflow has no store for.

    Raises:
        UserError: naming the URI and what to do.
    """
    check_uri(tracking_uri(config, outputs), "tracking.uri", "or choose tracking=csv")


def check_uri(uri: str, key: str, otherwise: str) -> None:
    """The same for a URI that was given by ``key``; ``otherwise`` is what else there is to do.

    Raises:
        UserError: naming the URI and what to do.
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
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), WAIT_S).close()
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
    """Whether SQLite itself finds fault with the file, which is read through up to a size; one that is in use is left to MLflow."""
    question = "PRAGMA quick_check(1)" if path.stat().st_size <= CHECKED else "SELECT count(*) FROM sqlite_master"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=WAIT_S)) as store:
            answer = store.execute(question).fetchone()
    except sqlite3.OperationalError:  # locked, or a journal to be rolled back, which needs the right to write
        return False
    except sqlite3.DatabaseError:
        return True
    return question.startswith("PRAGMA") and answer != ("ok",)
