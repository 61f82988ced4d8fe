"""Large messages: their bytes lie in a file named by their SHA-256, only a claim check travels, and the file is removed when no reader
can need it any more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from esper.bus.codec import Envelope, Refused, decode, encode
from esper.bus.protocol import STREAMS, parse_id
from esper.bus.server import keys
from esper.bus.server.connection import Client, Group
from esper.messages import ClaimCheck

THRESHOLD = 1 << 20
LIMIT = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{64}")


class PayloadGone(Refused):
    """The payload a claim check names is not there."""


def store_if_large(folder: Path, wire: bytes, envelope: Envelope) -> bytes:
    """``wire`` itself when small, otherwise the wire bytes of its claim check, its own being stored."""
    if len(wire) <= THRESHOLD:
        return wire
    digest = hashlib.sha256(wire).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / digest
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(wire)
        partial.replace(path)
    return encode(msgspec.structs.replace(envelope, body=ClaimCheck(digest=digest, size=len(wire))))


def load_payload(folder: Path, envelope: Envelope) -> Envelope:
    """The message a claim check stands for, its hash verified; raises Refused when it is gone or was changed."""
    claim = envelope.body
    assert isinstance(claim, ClaimCheck)
    path = path_of(folder, claim.digest)
    if not 0 < claim.size <= LIMIT:
        raise Refused("oversized", f"a payload of {claim.size} bytes is not between 1 and {LIMIT} bytes")
    try:
        if path.stat().st_size != claim.size:
            raise Refused("corrupt", f"stored payload {claim.digest[:12]}… does not have its stated size")
        wire = path.read_bytes()
    except FileNotFoundError as error:
        raise PayloadGone("malformed", f"the stored payload {claim.digest[:12]}… is not there") from error
    except OSError as error:
        raise Refused("malformed", f"the stored payload {claim.digest[:12]}… cannot be read: {error.strerror}") from error
    if hashlib.sha256(wire).hexdigest() != claim.digest:
        raise Refused("corrupt", f"the stored payload {claim.digest[:12]}… does not have its hash")
    inner = decode(wire, LIMIT)
    if (inner.run, inner.producer, inner.id) != (envelope.run, envelope.producer, envelope.id):
        raise Refused("malformed", f"the stored payload {claim.digest[:12]}… belongs to another message")
    if isinstance(inner.body, ClaimCheck):
        raise Refused("malformed", "a claim check stands for a claim check")
    return inner


def path_of(folder: Path, digest: str) -> Path:
    """The file of a payload; raises Refused for a text that is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise Refused("malformed", "a claim check does not name a SHA-256")
    return folder / digest


log = logging.getLogger(__name__)

KEPT = "kept"  # a file of this name among the payloads: see keep_all
REMOVED = "payloads.removed"  # a file of this name beside their folder: see Payloads.release
RELEASED = (
    "the large messages of run {run} were removed when it had finished and all had read them, so `esper track` cannot write it"
    " anew: what it kept stays in the run's folder, and a longer run goes on with tracking.process=internal"
)
PAGE = 32  # entries read at once, each up to some MB


def keep_all(folder: Path) -> None:
    """Until ``release`` no payload is removed: a tracker in a process of its own reads all again at every start, its first included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEPT).touch()


def kept(folder: Path) -> bool:
    """Whether ``keep_all`` holds."""
    return (folder / KEPT).exists()


def released(folder: Path) -> bool:
    """Whether ``release`` has removed any, so that a reader from the beginning of the run does not find all of it."""
    return (folder.parent / REMOVED).exists()


class Payloads:
    """The stored payloads of one run; methods that ask the server raise its errors."""

    def __init__(self, client: Client, folder: Path, run: str) -> None:
        self._client, self.folder, self._run = client, folder, run

    def discard(self, stream: str, producer: str, id: str, digest: str) -> None:
        """Remove the payload of an acknowledged message, unless a group or a dead letter still needs it, or ``keep_all`` holds."""
        if not kept(self.folder) and not self._needed(stream, producer, id, digest):
            path_of(self.folder, digest).unlink(missing_ok=True)

    def discard_letter(self, letter: dict[bytes, bytes]) -> None:
        """The same for a dead letter that was purged; a file stays if the letter only claims that it is its own."""
        found = _claim_in(letter.get(b"m", b""))
        if found is None or not self._own(*found):
            return
        stream, producer, origin = (letter.get(name, b"").decode(errors="replace") for name in (b"stream", b"producer", b"origin"))
        self.discard(stream, producer, origin, found[1].digest)

    def release(self) -> None:
        """The run is finished and was read from its beginning: remove all payloads but those that a group or a dead letter needs.

        These are removed when they are acknowledged.
        """
        import redis

        if not self.folder.is_dir():
            return
        held = kept(self.folder)
        (self.folder / KEPT).unlink(
            missing_ok=True
        )  # before the groups are asked: a message acknowledged meanwhile has its payload removed there
        try:
            waited_for = self._waited_for()
        except redis.RedisError:
            if held:
                keep_all(self.folder)
            raise
        gone = [path for path in self.folder.iterdir() if path.name not in waited_for]
        if gone:
            (self.folder.parent / REMOVED).touch()
        for path in gone:
            path.unlink(missing_ok=True)

    def let_go(self, stream: str, producer: str, id: str, group: str) -> bool:
        """Whether a payload is missing because it was removed before ``group`` came: all others had acknowledged the message."""
        if released(self.folder):
            return True
        key = keys.entries(self._run, stream, producer)
        others = [found for found in self._groups(key) if found["name"] != group.encode()]
        return bool(others) and not any(self._waits(key, found, id) for found in others)

    # --- inside ---

    def _groups(self, key: str) -> list[Group]:
        return self._client.xinfo_groups(key) if self._client.exists(key) else []

    def _waits(self, key: str, group: Group, id: str) -> bool:
        """Whether a group was not given an entry, or has not acknowledged it."""
        if parse_id(group["last-delivered-id"]) < parse_id(id):
            return True
        return bool(self._client.xpending_range(key, group["name"], id, id, 1))

    def _needed(self, stream: str, producer: str, id: str, digest: str) -> bool:
        mark, key = digest.encode(), keys.entries(self._run, stream, producer)
        groups = self._groups(key)
        if any(self._waits(key, group, id) for group in groups):
            return True
        if any(mark in wire for wire in self._letters()):  # in the order in which a message wanders from one to the next
            return True
        replays = (self._replays(stream, group["name"]) for group in groups)
        return any(mark in wire for wires in replays for wire in wires)

    def _waited_for(self) -> set[str]:
        """Digests of all that a group or a dead letter of the run still needs."""
        found: set[str] = set()
        groups: list[tuple[str, bytes]] = []
        for stream in STREAMS:
            for producer in keys.names(self._client.smembers(keys.producers(self._run, stream))):
                key = keys.entries(self._run, stream, producer)
                names = [group["name"] for group in self._groups(key)]
                groups += [(stream, name) for name in names]
                found |= {_digest(wire) for name in names for wire in self._unread(key, name)}
        found |= {_digest(wire) for wire in self._letters()}
        return found | {_digest(wire) for stream, name in groups for wire in self._replays(stream, name)}

    def _replays(self, stream: str, group: bytes) -> Iterator[bytes]:
        return (wire for name in keys.names([group]) for wire in self._unread(keys.replays(self._run, stream, name), group))

    def _letters(self) -> Iterator[bytes]:
        return (fields.get(b"m", b"") for _, fields in self._client.xrange(keys.dead(self._run)))

    def _unread(self, key: str, group: bytes) -> Iterator[bytes]:
        """Wire bytes of the entries that a group was not given, or has not acknowledged."""
        last = next((found["last-delivered-id"] for found in self._groups(key) if found["name"] == group), None)
        start = "-"
        while last is not None and (pending := self._client.xpending_range(key, group, start, "+", PAGE)):
            for entry in pending:
                yield from (fields.get(b"m", b"") for _, fields in self._client.xrange(key, entry["message_id"], entry["message_id"]))
            start = f"({pending[-1]['message_id'].decode()}"
        last = last or b"0-0"
        while entries := self._client.xrange(key, b"(" + last, "+", PAGE):
            yield from (fields.get(b"m", b"") for _, fields in entries)
            last = entries[-1][0]

    def _own(self, envelope: Envelope, claim: ClaimCheck) -> bool:
        """Whether the file that a claim check names belongs to that message, or is of no use."""
        try:
            wire = path_of(self.folder, claim.digest).read_bytes()
            if hashlib.sha256(wire).hexdigest() != claim.digest:
                return True
            inner = decode(wire, LIMIT)
        except (OSError, Refused):
            return False
        return (inner.run, inner.producer, inner.id) == (envelope.run, envelope.producer, envelope.id)


class PendingDiscards:
    """Payloads of handled messages that wait until the acknowledgements are sent and the server says which groups need them."""

    def __init__(self, payloads: Payloads, stream: str) -> None:
        self._payloads, self._stream = payloads, stream
        self._waiting: list[tuple[str, str, str]] = []  # producer, id and digest

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, producer: str, id: str, digest: str) -> None:
        """This message was handled."""
        self._waiting.append((producer, id, digest))

    def discard(self) -> None:
        """Remove those that no reader needs; if the server does not answer, they wait for the next call."""
        import redis

        waiting, self._waiting = self._waiting, []
        while waiting:
            try:
                self._payloads.discard(self._stream, *waiting[0])
            except (redis.ConnectionError, redis.TimeoutError):
                self._waiting += waiting
                return
            except redis.ResponseError as error:
                log.warning("a stored payload stays until its run is finished, since the bus server said: %s", error)
            waiting.pop(0)


def _claim_in(wire: bytes) -> tuple[Envelope, ClaimCheck] | None:
    """The claim check in these wire bytes and its envelope, if it names a file."""
    try:
        envelope = decode(wire)
        if isinstance(envelope.body, ClaimCheck):
            path_of(Path(), envelope.body.digest)
            return envelope, envelope.body
    except Refused:
        pass
    return None


def _digest(wire: bytes) -> str:
    found = _claim_in(wire)
    return found[1].digest if found is not None else ""
