"""Connections: TLS and ACL users where configured, credentials from the environment only and never in a message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, TypeVar, cast
from urllib.parse import urlsplit

from esper import secrets
from esper.bus.config import RedisConfig
from esper.errors import UserError

T = TypeVar("T")
Fields = dict[bytes, bytes]
Entry = tuple[bytes, Fields]  # id and fields of a stream entry
StreamEntries = list[tuple[bytes, list[Entry]]]  # by key
Part = bytes | str | int | float  # of a request
USER_VARIABLE = "ESPER_BUS_USER"
PASSWORD_VARIABLE = "ESPER_BUS_PASSWORD"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class NoAnswer(UserError):
    """No server answers; ``finding`` is the sentence with address and error."""

    def __init__(self, finding: str) -> None:
        super().__init__(f"{finding}: start the server or correct bus.url, or use bus=embedded, which starts its own")
        self.finding = finding


@dataclass(frozen=True, repr=False)
class Address:
    """Where a server is and how to log in; its ``repr`` shows no secret."""

    host: str
    tcp_port: int
    database: int = 0
    user: str | None = None
    password: str | None = None
    tls: bool = False
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""

    def __repr__(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://{self.host}:{self.tcp_port}/{self.database}"


Group = TypedDict("Group", {"name": bytes, "pending": int, "last-delivered-id": bytes})
Stream = TypedDict("Stream", {"last-generated-id": bytes})


class Pending(TypedDict):
    """How many entries a group has not acknowledged, and the oldest of them."""

    pending: int
    min: bytes | None


class PendingEntry(TypedDict):
    """One entry that a group has not acknowledged."""

    message_id: bytes
    times_delivered: int


class Client(Protocol):
    """The methods of ``redis.Redis`` that esper calls, with the types of a client that decodes nothing and speaks protocol 2.

    redis-py declares the union of all its settings. ``connect`` knows the settings, so it narrows the types once, here.
    """

    def ping(self) -> bool: ...
    def close(self) -> None: ...
    def info(self, section: str) -> dict[str, str]: ...
    def get(self, key: str) -> bytes | None: ...
    def set(self, key: str, value: bytes | str) -> bool: ...
    def exists(self, key: str) -> int: ...
    def sadd(self, key: str, *members: str) -> int: ...
    def smembers(self, key: str) -> AbstractSet[bytes]: ...
    def memory_usage(self, key: str) -> int | None: ...
    def xlen(self, key: str) -> int: ...
    def xdel(self, key: str, *ids: bytes | str) -> int: ...
    def xtrim(self, key: str, *, minid: str, approximate: bool) -> int: ...
    def xrange(self, key: str, min: bytes | str = "-", max: bytes | str = "+", count: int | None = None) -> list[Entry]: ...
    def xrevrange(self, key: str, max: bytes | str = "+", min: bytes | str = "-", count: int | None = None) -> list[Entry]: ...
    def xinfo_stream(self, key: str) -> Stream: ...
    def xinfo_groups(self, key: str) -> list[Group]: ...
    def xgroup_create(self, key: str, group: str, id: str, mkstream: bool) -> bool: ...
    def xgroup_destroy(self, key: str, group: str | bytes) -> int: ...
    def xpending(self, key: str, group: str | bytes) -> Pending: ...
    def xpending_range(
        self, key: str, group: str | bytes, min: bytes | str, max: bytes | str, count: int, consumer: str | None = None
    ) -> list[PendingEntry]: ...
    def xclaim(
        self, key: str, group: str, consumer: str, min_idle_time: int, ids: list[bytes], *, retrycount: int
    ) -> list[tuple[bytes | None, Fields]]: ...
    def xautoclaim(
        self, key: str, group: str, consumer: str, min_idle_time: int, start: bytes | str, *, count: int
    ) -> tuple[bytes | str, list[tuple[bytes, Fields | None]]]: ...
    def xreadgroup(
        self, group: str, consumer: str, streams: Mapping[str, str], count: int, block: int | None = None
    ) -> StreamEntries | None: ...
    def xack(self, key: str, group: str, *ids: bytes) -> int: ...
    def register_script(self, script: str) -> Script: ...
    def pipeline(self, transaction: bool = True) -> Pipeline: ...


class Script(Protocol):
    """A script of the server, called by name once it was sent; its reply is that of the script."""

    def __call__(self, *, keys: Sequence[str], args: Iterable[Part]) -> Any: ...


class Pipeline(Protocol):
    """Requests that are sent together: each call but ``watch`` and ``mget`` after it only notes the request."""

    def __enter__(self) -> Pipeline: ...
    def __exit__(self, *_: object) -> None: ...
    def watch(self, *keys: str) -> object: ...
    def mget(self, *keys: str) -> list[bytes | None]: ...
    def multi(self) -> None: ...
    def xadd(self, key: str, fields: dict[str, bytes], id: str) -> object: ...
    def xack(self, key: str, group: str, *ids: bytes) -> object: ...
    def smembers(self, key: str) -> object: ...
    def xreadgroup(self, group: str, consumer: str, streams: Mapping[str, str], count: int) -> object: ...
    def execute(self, raise_on_error: bool = True) -> list[Any]: ...


def address_of(config: RedisConfig) -> Address:
    """The address in a configuration, with user and password from the environment; raises UserError when unusable."""
    accepted = "give redis://host:port/0 or rediss://host:port/0, the port from 1 to 65535"
    secrets.check("bus.url", config.url)
    try:
        parts = urlsplit(config.url)
        tcp_port = parts.port if parts.port is not None else 6379
    except ValueError:  # a port that is none, brackets that are no IPv6 address
        raise UserError(f"bus.url={config.url!r} is no server address: {accepted}") from None
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not tcp_port:
        raise UserError(f"bus.url={config.url!r} is no server address: {accepted}")
    database = parts.path.strip("/") or "0"
    if not database.isdigit():
        raise UserError(f"bus.url={config.url!r} names database {database!r}: give a number")
    tls = parts.scheme == "rediss"
    if not tls and os.environ.get(PASSWORD_VARIABLE) and parts.hostname not in LOOPBACK:
        raise UserError(
            f"bus.url={config.url!r} would send the password of {PASSWORD_VARIABLE} unencrypted to another machine: use rediss://"
        )
    return Address(
        host=parts.hostname,
        tcp_port=tcp_port,
        database=int(database),
        user=os.environ.get(USER_VARIABLE) or None,
        password=os.environ.get(PASSWORD_VARIABLE) or None,
        tls=tls,
        tls_ca=config.tls_ca,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
    )


def connect(address: Address, timeout_s: float, retries: int = 0) -> Client:
    """A client of one server, not yet connected.

    ``retries`` is 0 for callers that must know of a lost reply (producers, group reads); commands that may be
    repeated get redis-py's own Retry with exponential backoff.
    """
    import redis
    from redis.backoff import ExponentialBackoff, NoBackoff
    from redis.retry import Retry

    backoff = ExponentialBackoff(cap=timeout_s, base=0.02) if retries else NoBackoff()
    tls: dict[str, Any] = {}
    if address.tls:
        tls = {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True}
        tls |= {"ssl_ca_certs": address.tls_ca} if address.tls_ca else {}
        tls |= {"ssl_certfile": address.tls_cert, "ssl_keyfile": address.tls_key} if address.tls_cert else {}
    client = redis.Redis(
        host=address.host,
        port=address.tcp_port,
        db=address.database,
        username=address.user,
        password=address.password,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        socket_read_size=1 << 18,
        retry=Retry(backoff, retries),
        retry_on_error=None,
        protocol=2,
        driver_info=None,
        **tls,
    )
    return cast("Client", client)


def unless_other_type(ask: Callable[[], T], otherwise: T) -> T:
    """The result of ``ask``, or ``otherwise`` where the key that it reads holds a value of another type, put there by a stranger."""
    import redis

    try:
        return ask()
    except redis.ResponseError as error:
        if not is_other_type(error):
            raise
        return otherwise


def is_other_type(error: Exception) -> bool:
    """Whether a server refused a request because of the type of the value under the key."""
    return "WRONGTYPE" in str(error)


def readable(address: Address, error: Exception) -> UserError:
    """The failure of a request as a sentence without credentials."""
    import redis

    if isinstance(error, redis.AuthenticationError):
        return UserError(
            f"the bus at {address!r} does not accept this login: set {USER_VARIABLE} and {PASSWORD_VARIABLE} to a user of that server"
        )
    if isinstance(error, redis.exceptions.NoPermissionError):
        return UserError(f"the user of the bus at {address!r} may not do what esper needs: {error}; see docs/operations.md")
    if isinstance(error, redis.ResponseError):
        return UserError(f"the bus at {address!r} refuses what esper asks of it: {error}")
    return NoAnswer(f"no bus answers at {address!r} ({type(error).__name__}: {error})")
