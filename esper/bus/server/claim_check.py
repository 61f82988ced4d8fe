"""Large messages: their bytes lie in a file named by their SHA-256, and only a claim check travels."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec

from esper.bus.codec import Envelope, Refused, decode, encode
from esper.messages import ClaimCheck

THRESHOLD = 1 << 20
LIMIT = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Gone(Refused):
    """The payload a claim check names is not there."""


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
    path = path_of(folder, claim.digest)
    if not 0 < claim.size <= LIMIT:
        raise Refused("oversized", f"a payload of {claim.size} bytes is not between 1 and {LIMIT} bytes")
    try:
        if path.stat().st_size != claim.size:
            raise Refused("corrupt", f"stored payload {claim.digest[:12]}… does not have its stated size")
        wire = path.read_bytes()
    except FileNotFoundError as error:
        raise Gone("malformed", f"the stored payload {claim.digest[:12]}… is not there") from error
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
    """Where a payload lies; raises Refused for what is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise Refused("malformed", "a claim check does not name a SHA-256")
    return folder / digest
