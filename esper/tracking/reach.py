"""Whether MLflow's store can be there at all: asked before training, without the seconds that importing MLflow takes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from esper.errors import UserError
from esper.tracking.config import MlflowConfig, tracking_uri

SQLITE = "sqlite:///"
MAGIC = b"SQLite format 3\x00"  # https://www.sqlite.org/fileformat.html, first 16 bytes
WAIT_S = 5.0
_OTHERWISE = "or choose tracking=csv"


def check_store(config: MlflowConfig, outputs: str) -> None:
    """Refuse a server that does not answer and a database file that is none.

    Raises:
        UserError: naming the URI and what to do.
    """
    uri = tracking_uri(config, outputs)
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    elif uri.startswith(SQLITE):
        _check_file(Path(uri.removeprefix(SQLITE).partition("?")[0]))
    elif "://" not in uri or uri.startswith("file:"):
        raise UserError(f"tracking.uri={uri} is a folder; give sqlite:///<absolute path>.db or http(s)://<server>.")


def _check_server(uri: str) -> None:
    parts = urlsplit(uri)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), WAIT_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"tracking.uri={uri} does not answer ({str(reason).lower()}); start the server (mlflow server), {_OTHERWISE}."
        ) from error


def _check_file(path: Path) -> None:
    if not path.exists():
        return
    if not os.access(path, os.W_OK):
        raise UserError(f"The MLflow store {path} cannot be written; get the right to, give another tracking.uri, {_OTHERWISE}.")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head not in (b"", MAGIC):
        raise UserError(
            f"The MLflow store {path} is damaged or no SQLite database; move it away, give another tracking.uri, {_OTHERWISE}."
        )
