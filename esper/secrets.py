"""Secrets stay out of configurations, which are written to the run's folder, the log and the tracker.

A password, a token or a key is refused before anything is written, without being repeated. It comes from the environment
or from the files that the libraries read themselves (``~/.netrc``, ``~/.pgpass``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from esper.errors import UserError

#: Addresses of servers: nothing follows the path of these, since a query has no use but a secret one.
ADDRESSES = ("bus.url", "bus.otlp", "tracking.uri", "uri")

#: Where the secrets of a group come from instead.
INSTEAD = {
    "bus.url": "put them into ESPER_BUS_USER and ESPER_BUS_PASSWORD",
    "bus.otlp": "put what the collector asks for into OTEL_EXPORTER_OTLP_HEADERS",
    "tracking.uri": (
        "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a token into MLFLOW_TRACKING_TOKEN, and a database's"
        " password where its driver looks for it (PGPASSWORD, ~/.pgpass)"
    ),
}
_OWN = "let the program that needs it read it from the environment"

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.\-]*):/{2}(?P<rest>[^\s'\"]*)", re.IGNORECASE)
_PAIR = re.compile(r"[^\s/@:'\"{\[,=]*:(?!//)[^\s@'\"{\[,]+@(?=[\w\[])")  # name:password@host without a scheme
_NAMED = r"(?:pass(?:word|wd|phrase)|pwd|pw|secret|credentials?|authorization|(?:api|access|private|secret|account)[_-]?key)"
_TOKEN = r"(?:access|auth|api|bearer|id|refresh|session|hf|github|gitlab|tracking|secret)[_-]?token"
_KEY = re.compile(rf"(?:.*[_.\-])?(?:{_NAMED}|{_TOKEN})|token|bearer", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(?P<name>[\w.\-]*(?:pass|pwd|token|secret|credential|auth|signature|(?:api|access|private|account)[_.\-]?key)[\w.\-]*"
    r"|\bkey|\bsig|\bpw)=(?P<value>[^&;#\s'\"]+)",
    re.IGNORECASE,
)
#: Databases take a user's name in the address; anywhere else a name alone may be a token.
_DATABASES = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle")
_SERVERS = ("http", "https", "redis", "rediss")
_FILES = ("sqlite", "file")


def refuse(tree: Any, path: str = "") -> None:
    """Raise UserError for a secret anywhere in nested mappings and lists of plain values; it names the key alone."""
    for key, value in _leaves(tree, path):
        check(key, value)


def refuse_words(words: Sequence[str]) -> None:
    """Raise UserError for a secret in a word of the command line, before any other sentence repeats the word."""
    for word in words:
        key, equals, text = word.partition("=")
        if equals:
            check(key.lstrip("+~-'\""), text)
        elif holds_secret("", word):
            raise UserError(f"A word of the command line has {_what('', word)}; {_OWN}.")


def check(key: str, text: str) -> None:
    """Raise UserError when the setting ``key`` is, or contains, a secret."""
    if not holds_secret(key, text):
        return
    instead = INSTEAD.get("tracking.uri" if key == "uri" else key, _OWN)
    raise UserError(f"{key} has {_what(key, text)}, which would be written into every saved config: {instead}.")


def holds_secret(key: str, text: str) -> bool:
    """Whether the value of ``key`` is a secret by its name, or an address with a password, a token or a key in it."""
    return bool(_what(key, text))


def redacted(text: str) -> str:
    """``text`` with ``…`` in place of the credentials before an address's ``@`` and of its query."""

    def bare(found: re.Match[str]) -> str:
        before, at, after = found["rest"].rpartition("@")
        rest = f"…{at}{after}" if _has_user(found["scheme"], before) else found["rest"]
        if found["scheme"].lower() in _SERVERS:
            rest = re.sub(r"([?#]).*", r"\1…", rest)
        return f"{found['scheme']}://" + _PARAMETER.sub(lambda parameter: f"{parameter['name']}=…", rest)

    return _PAIR.sub("…@", _URL.sub(bare, text))


def _what(key: str, text: str) -> str:
    """The secret in the value, in words; empty for none."""
    if not text:
        return ""
    if _KEY.fullmatch(key.rpartition(".")[2]):
        return "a secret by its name"
    plain = unquote(unquote(text))
    for found in _URL.finditer(plain):
        if _has_user(found["scheme"], found["rest"].rpartition("@")[0], strict=key in ADDRESSES):
            return "a user or password in it" if key in ADDRESSES else "an address with a user or password in it"
        if key in ADDRESSES and found["scheme"].lower() in _SERVERS and re.search("[?#]", found["rest"]):
            return "something after a ? or # in it"
        if _PARAMETER.search(found["rest"]):
            return "a token or password in it"
    return "a user or password in it" if not _URL.search(plain) and _PAIR.search(plain) else ""


def _has_user(scheme: str, before: str, strict: bool = True) -> bool:
    """Whether the text ``before`` the last ``@`` of an address may hold a secret: a password may itself contain ``/?#@``.

    Where it need not be a server's address (``strict`` is False), ``https://host/package@2`` is none.
    """
    kind = scheme.lower().partition("+")[0]
    if not before or kind in _FILES:
        return False
    return ":" in before or (kind not in _DATABASES and (strict or "/" not in before))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
            yield from _leaves(str(key), path)  # of a setting that itself holds keys
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value, path)
    elif isinstance(tree, str):
        yield path, tree
