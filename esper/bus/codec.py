"""The bytes on the wire: eight bytes of header, then one msgpack envelope around a message body.

========  ======  ===========================================================================================
offset    bytes   meaning
========  ======  ===========================================================================================
0         2       ``b"ES"``
2         1       schema version (``messages.SCHEMA_VERSION`` of the sender)
3         1       zero, reserved
4         4       CRC-32 (that of zlib, little-endian) of bytes 0–3 followed by everything from byte 8 on
8         …       msgpack array: run, producer, epoch, sequence, time, after, body
========  ======  ===========================================================================================

The checksum is verified before anything is parsed, so a corrupted message is refused as corrupted whatever it says.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated

import msgspec
from zlib_ng.zlib_ng import crc32

from esper.bus.messages import BODIES, SCHEMA_VERSION, Message

MAGIC = b"ES"
HEADER_BYTES = 8
MAX_BYTES = 8 << 20  # larger payloads travel by claim check, so nothing honest comes near this

_Body = reduce(or_, BODIES)
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # nobody counts further, and no reader need be able to
_Time = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]  # seconds; every clock there is shows less
_Cause = Annotated[str, msgspec.Meta(pattern=r"(?s)^.*/[0-9]{1,20}-[0-9]{1,20}\Z")]


class Refused(ValueError):
    """A message that is not accepted; ``reason`` is one word: oversized, malformed, corrupt, newer or run."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Who says what, and where it stands in its stream.

    ``time`` is the sender's clock in seconds, never falling within a producer: it orders producers among one another
    and measures latency, and no result depends on it. ``after`` names messages (``producer/epoch-sequence``) that must
    be handled before this one under causal order.
    """

    run: str
    producer: str
    epoch: _Number
    sequence: _Number
    time: _Time
    after: tuple[_Cause, ...]
    body: _Body  # type: ignore[valid-type]

    @property
    def id(self) -> str:
        """Stream entry id, ``<epoch>-<sequence>``."""
        return f"{self.epoch}-{self.sequence}"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """Wire bytes of an envelope."""
    buffer = bytearray(HEADER_BYTES)
    buffer[0:2] = MAGIC
    buffer[2] = SCHEMA_VERSION
    _encoder.encode_into(envelope, buffer, HEADER_BYTES)
    view = memoryview(buffer)
    checksum = crc32(view[HEADER_BYTES:], crc32(view[:4]))
    buffer[4:8] = checksum.to_bytes(4, "little")
    view.release()
    return bytes(buffer)


def decode(wire: bytes | memoryview, limit: int = MAX_BYTES) -> Envelope:
    """The envelope in ``wire``; raises Refused (with a reason) for whatever is not exactly one well-formed message."""
    if len(wire) > limit:
        raise Refused("oversized", f"a message of {len(wire)} bytes is larger than the limit of {limit} bytes")
    view = memoryview(wire)
    if len(view) < HEADER_BYTES or view[0:2] != MAGIC:
        raise Refused("malformed", "these bytes do not start like an esper message")
    checksum = crc32(view[HEADER_BYTES:], crc32(view[:4]))
    if checksum != int.from_bytes(view[4:8], "little"):
        raise Refused("corrupt", "the checksum of a message does not match its bytes")
    version = view[2]
    if version > SCHEMA_VERSION:
        raise Refused(
            "newer",
            f"a message of schema version {version} came in, and this esper reads versions up to {SCHEMA_VERSION}:"
            " upgrade the older side",
        )
    try:
        return _decoder.decode(view[HEADER_BYTES:])
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise Refused("malformed", f"a message does not have the fields of its kind: {error}") from error


def encode_body(message: Message) -> bytes:
    """Bytes of a body alone, for checkpoints that keep commands; read back by ``decode_body``."""
    return _encoder.encode(message)


_body_decoder = msgspec.msgpack.Decoder(_Body)


def decode_body(data: bytes) -> Message:
    """Inverse of ``encode_body``; raises Refused when the bytes are not one."""
    try:
        return _body_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused("malformed", f"these bytes are no message body: {error}") from error
