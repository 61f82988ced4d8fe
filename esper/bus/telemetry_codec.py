"""Packing of telemetry buffers: ``raw``, ``delta`` (lossless) and ``rounded`` (10 bits of mantissa, then as delta).

``delta`` follows what columnar stores do with floats: values ordered by column, then tick, then seed; the difference of
each value's bits to those of the same seed one tick before; bytes of equal significance side by side (shuffle); zstd at
level 1. Bits are compared as unsigned integers, so nothing is lost, NaN payloads included.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from esper.bus.codec import Refused
from esper.messages import Telemetry

if TYPE_CHECKING:
    import zstandard

CODECS = ("raw", "delta", "rounded")
MAX_VALUES = 1 << 26  # 256 MiB unpacked: a hostile header must not make us allocate more
_MANTISSA_DROPPED = 23 - 10
_local = threading.local()


def shape(message: Telemetry) -> tuple[int, int, int]:
    """``(ticks, seeds, columns)`` of a message; raises Refused when they cannot be meant."""
    result = (len(message.ticks), message.seeds, len(message.columns))
    if min(result) < 0 or math.prod(result) > MAX_VALUES:
        raise Refused("oversized", f"telemetry of shape {result} is larger than {MAX_VALUES} values")
    return result


def pack(message: Telemetry, codec: str) -> Telemetry:
    """A raw message with its buffer packed by ``codec``."""
    assert message.codec == "raw" and codec in CODECS, (message.codec, codec)
    if codec == "raw":
        return message
    bits = np.frombuffer(message.data, dtype="<u4").reshape(shape(message))
    if codec == "rounded":
        bits = round_mantissa(bits)
    by_column = bits.transpose(2, 0, 1)
    delta = by_column.copy()
    delta[:, 1:] -= by_column[:, :-1]
    shuffled = np.ascontiguousarray(delta.reshape(-1).view(np.uint8).reshape(-1, 4).T)
    data = _compressor().compress(shuffled.data)
    return replace(message, codec=codec, data=data)


def unpack(message: Telemetry) -> np.ndarray:
    """The values, float32 ``[ticks, seeds, columns]``; raises Refused when the buffer does not hold exactly them."""
    dimensions = shape(message)
    size = 4 * math.prod(dimensions)
    if message.codec == "raw":
        if len(message.data) != size:
            raise Refused("malformed", f"telemetry of shape {dimensions} needs {size} bytes and has {len(message.data)}")
        return np.frombuffer(message.data, dtype="<f4").reshape(dimensions)
    if message.codec not in CODECS:
        raise Refused("malformed", f"telemetry codec {message.codec!r} is not one of {', '.join(CODECS)}")
    ticks, seeds, columns = dimensions
    shuffled = np.frombuffer(_decompress(message.data, size), dtype=np.uint8).reshape(4, -1)
    bits = np.ascontiguousarray(shuffled.T).reshape(-1).view("<u4").reshape(columns, ticks, seeds)
    values = np.cumsum(bits, axis=1, dtype=np.uint32)
    return np.ascontiguousarray(values.transpose(1, 2, 0)).view("<f4")


def unpacked(message: Telemetry) -> Telemetry:
    """The same message with its buffer raw, as every consumer sees it."""
    if message.codec == "raw":
        unpack(message)
        return message
    return replace(message, codec="raw", data=unpack(message).tobytes())


def round_mantissa(bits: np.ndarray) -> np.ndarray:
    """Float32 bits with 10 bits of mantissa (relative error at most 2⁻¹¹); infinities and NaN are unchanged."""
    half = np.uint32(1 << (_MANTISSA_DROPPED - 1))
    mask = np.uint32(0xFFFFFFFF << _MANTISSA_DROPPED & 0xFFFFFFFF)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded = (bits + half) & mask
    return np.where(special, (bits & mask) | ((bits & ~mask) != 0) * np.uint32(0x00400000), rounded)


def _decompress(data: bytes, size: int) -> bytes:
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(data) != size:
            raise Refused("malformed", f"packed telemetry does not say that it unpacks to {size} bytes")
        decompressor: zstandard.ZstdDecompressor = _local.decompressor
        return decompressor.decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise Refused("malformed", f"packed telemetry cannot be unpacked: {error}") from error


def _compressor() -> zstandard.ZstdCompressor:
    import zstandard

    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=1)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor
