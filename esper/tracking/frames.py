"""What the training process says to a tracker in another process, over a pipe: length-prefixed msgpack, no pickle."""

from __future__ import annotations

from typing import Any, BinaryIO

import msgspec

from esper.bus.codec import message_hook, to_plain
from esper.messages import Message
from esper.tracking.config import MlflowConfig
from esper.tracking.run_info import RunRecord


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Before Open, as early as can be: import what is needed and try whether the store takes this run."""

    config: MlflowConfig
    outputs: str
    folder: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """The run begins."""

    config: MlflowConfig
    record: RunRecord


class Record(msgspec.Struct, frozen=True, tag=True):
    """Messages of the bus; the one frame that is not answered."""

    messages: list[Message]


class Flush(msgspec.Struct, frozen=True, tag=True):
    """Make durable what came so far."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Last frame."""

    status: str
    summary: dict[str, Any]


class Reply(msgspec.Struct, frozen=True):
    """Answer to a frame; ``error`` is empty when it was done, ``refused`` says that the user can mend it."""

    error: str = ""
    refused: bool = False


Frame = Prepare | Open | Record | Flush | Close
_encoder = msgspec.msgpack.Encoder()


def write(stream: BinaryIO, frame: Frame | Reply) -> None:
    """Send one frame."""
    if isinstance(frame, Record):
        frame = msgspec.structs.replace(frame, messages=[to_plain(message) for message in frame.messages])
    body = _encoder.encode(frame)
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def read(stream: BinaryIO, kind: Any = Frame) -> Any:
    """The next frame of ``kind``; raises EOFError when the other side has gone."""
    head = stream.read(4)
    size = int.from_bytes(head, "big")
    body = stream.read(size) if len(head) == 4 else b""
    if len(head) < 4 or len(body) < size:
        raise EOFError("the other side of the pipe has gone")
    return msgspec.msgpack.decode(body, type=kind, dec_hook=message_hook)
