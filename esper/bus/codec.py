"""The bytes on the wire: eight bytes of header, then one msgpack envelope around a message body.

========  ======  ===========================================================================================
offset    bytes   meaning
========  ======  ===========================================================================================
0         2       ``b"ES"``
2         1       schema version (``SCHEMA_VERSION`` of the sender)
3         1       zero, reserved
4         4       CRC-32 (that of zlib, little-endian) of bytes 0–3 followed by everything from byte 8 on
8         …       msgpack array: run, producer, epoch, sequence, time, after, body
========  ======  ===========================================================================================

The checksum is verified before anything is parsed, so a corrupted message is refused before its contents count.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any

import msgspec
from zlib_ng.zlib_ng import crc32

from esper.messages import MESSAGES, ApplyEach, ApplyTogether, Command, Message, Predicate, Proposal, Selector

SCHEMA_VERSION = 1
MAGIC = b"ES"
HEADER_BYTES = 8
MAX_BYTES = 8 << 20  # larger payloads travel by claim check, so nothing honest comes near this

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in MESSAGES}
_FIELDS: dict[type[Any], tuple[str, ...]] = {kind: tuple(one.name for one in fields(kind)) for kind in (*MESSAGES, Selector, Predicate)}
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # nobody counts further, and no reader need be able to
_Time = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]  # seconds; every clock there is shows less
_Cause = Annotated[str, msgspec.Meta(pattern=r"(?s)^.*/[0-9]{1,20}-[0-9]{1,20}\Z")]


class Refused(ValueError):
    """A message that is not accepted; ``reason`` is one word: oversized, malformed, corrupt, newer or run."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A message with its sender and its position in the stream.

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
    body: Message

    @property
    def id(self) -> str:
        """Stream entry id, ``<epoch>-<sequence>``."""
        return f"{self.epoch}-{self.sequence}"


def to_plain(message: Message) -> dict[str, Any]:
    """A message as it is written: ``kind``, the name of its class, and its fields."""
    plain = {"kind": type(message).__name__} | {name: getattr(message, name) for name in _FIELDS[type(message)]}
    if isinstance(message, ApplyTogether | ApplyEach | Proposal):
        plain["commands"] = [to_plain(command) for command in message.commands]
    return plain


def from_plain(plain: Any) -> Message:
    """Inverse of ``to_plain``; raises msgspec.ValidationError for anything else."""
    if not isinstance(plain, dict) or plain.get("kind") not in _KINDS:
        raise msgspec.ValidationError(f"no message is of the kind {plain.get('kind') if isinstance(plain, dict) else plain!r}")
    kind = _KINDS[plain["kind"]]
    _refuse_unknown_parts(plain.get("select"))
    if kind in (ApplyTogether, ApplyEach, Proposal) and isinstance(plain.get("commands"), list):
        parts = [from_plain(part) for part in plain["commands"]]
        commands = [part for part in parts if isinstance(part, Command)]
        if len(commands) < len(parts):
            raise msgspec.ValidationError(f"{kind.__name__} holds something that is no command")
        together: ApplyTogether | ApplyEach | Proposal = msgspec.convert(plain | {"commands": []}, kind)
        return replace(together, commands=commands)
    message: Message = msgspec.convert(plain, kind)
    return message


def _refuse_unknown_parts(select: Any) -> None:
    """An unknown field of a message is passed over, but an unknown part of a selection might have selected fewer seeds."""
    if not isinstance(select, dict):
        return
    where = select.get("where") or []
    for kind, given in ((Selector, select), *((Predicate, one) for one in where if isinstance(one, dict))):
        if unknown := given.keys() - set(_FIELDS[kind]):
            raise msgspec.ValidationError(f"a {kind.__name__} has no part {', '.join(map(str, unknown))}")


def message_hook(kind: type, value: Any) -> Any:
    """For decoders of structs that hold messages."""
    assert kind is Message, kind
    return from_plain(value)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope, dec_hook=message_hook)
_plain_decoder = msgspec.msgpack.Decoder(dict[str, Any])


def encode(envelope: Envelope) -> bytes:
    """Wire bytes of an envelope."""
    buffer = bytearray(HEADER_BYTES)
    buffer[0:2] = MAGIC
    buffer[2] = SCHEMA_VERSION
    _encoder.encode_into(msgspec.structs.replace(envelope, body=to_plain(envelope.body)), buffer, HEADER_BYTES)
    view = memoryview(buffer)
    checksum = crc32(view[HEADER_BYTES:], crc32(view[:4]))
    buffer[4:8] = checksum.to_bytes(4, "little")
    view.release()
    return bytes(buffer)


def decode(wire: bytes | memoryview, limit: int = MAX_BYTES) -> Envelope:
    """The envelope in ``wire``; raises Refused (with a reason) for bytes that are not exactly one well-formed message."""
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
            f"a message of schema version {version} came in, and this esper reads versions up to {SCHEMA_VERSION}: upgrade the older side",
        )
    try:
        return _decoder.decode(view[HEADER_BYTES:])
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise Refused("malformed", f"a message does not have the fields of its kind: {error}") from error


def encode_body(message: Message) -> bytes:
    """Bytes of a body alone, for checkpoints that keep commands; read back by ``decode_body``."""
    return _encoder.encode(to_plain(message))


def decode_body(data: bytes) -> Message:
    """Inverse of ``encode_body``; raises Refused when the bytes are not one."""
    try:
        return from_plain(_plain_decoder.decode(data))
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise Refused("malformed", f"these bytes are no message body: {error}") from error
