"""Large messages: their bytes lie in a file named by their SHA-256, and only a claim check travels."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from esper.bus.codec import Envelope, Refused, decode, encode
from esper.bus.ids import parse
from esper.bus.messages import ClaimCheck

if TYPE_CHECKING:
    import redis

THRESHOLD = 1 << 20
LIMIT = 1 << 30
KEPT = "kept"  # a file of this name in the folder: see keep_all
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_in(folder: Path, wire: bytes, envelope: Envelope) -> bytes:
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


def check_out(folder: Path, envelope: Envelope) -> Envelope:
    """The message a claim check stands for, its hash verified; raises Refused when it is gone or was changed."""
    claim = envelope.body
    assert isinstance(claim, ClaimCheck)
    path = _path(folder, claim.digest)
    if not 0 < claim.size <= LIMIT:
        raise Refused("oversized", f"a payload of {claim.size} bytes is not between 1 and {LIMIT} bytes")
    try:
        if path.stat().st_size != claim.size:
            raise Refused("corrupt", f"stored payload {claim.digest[:12]}… does not have its stated size")
        wire = path.read_bytes()
    except OSError as error:
        raise Refused(
            "malformed", f"the stored payload {claim.digest[:12]}… cannot be read: {error.strerror}"
        ) from error
    if hashlib.sha256(wire).hexdigest() != claim.digest:
        raise Refused("corrupt", f"the stored payload {claim.digest[:12]}… does not have its hash")
    inner = decode(wire, LIMIT)
    if (inner.run, inner.producer, inner.id) != (envelope.run, envelope.producer, envelope.id):
        raise Refused("malformed", f"the stored payload {claim.digest[:12]}… belongs to another message")
    if isinstance(inner.body, ClaimCheck):
        raise Refused("malformed", "a claim check stands for a claim check")
    return inner


def keep_all(folder: Path) -> None:
    """From now on no payload is removed: a tracker in a process of its own reads all again at every start, its first included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEPT).touch()


def discard_if_read(client: redis.Redis, folder: Path, key: str, entry: bytes, digest: str) -> None:
    """Remove a payload once every group on its stream has acknowledged the entry; the last of them does.

    It stays where the server does not answer, and after ``keep_all``.
    """
    import redis

    if (folder / KEPT).exists():
        return
    try:
        for group in client.xinfo_groups(key):
            if parse(group["last-delivered-id"]) < parse(entry):
                return
            if client.xpending_range(key, group["name"], entry, entry, 1):
                return
    except redis.RedisError:
        return
    _path(folder, digest).unlink(missing_ok=True)


def _path(folder: Path, digest: str) -> Path:
    if not _DIGEST.fullmatch(digest):
        raise Refused("malformed", "a claim check does not name a SHA-256")
    return folder / digest
