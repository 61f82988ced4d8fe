"""A checkpoint's files: bytes with a SHA-256 for every piece of them, and tensors in the safetensors format.

One hash over a whole file would occupy a single core, and SHA-256 is slower than reading from the disk's cache. Pieces are
checked on all cores at once.

A safetensors file is 8 bytes of header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors). The format is written here because the engine runs where only torch is installed,
and because the hash, the file and the disk must not each cost a pass of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 16 << 20
SMALL = 1 << 20
Content = Sequence[memoryview | bytes]


@dataclass(frozen=True)
class Written:
    """Size of a file and the SHA-256 of each of its pieces of ``piece`` bytes (the last is the rest)."""

    bytes: int
    piece: int
    sha256: tuple[str, ...]

    def card(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {"bytes": self.bytes, "piece": self.piece, "sha256": list(self.sha256)}

    @classmethod
    def of_card(cls, card: dict[str, Any]) -> Written:
        """Inverse of ``card``. Raises KeyError, TypeError or ValueError for anything else."""
        made = cls(card["bytes"], card["piece"], tuple(card["sha256"]))
        if type(made.bytes) is not int or type(made.piece) is not int or made.bytes < 0 or made.piece < 1:
            raise ValueError("its sizes are no numbers")
        if len(made.sha256) != -(-made.bytes // made.piece):
            raise ValueError("it has not one hash for each piece")
        return made


def write_bytes(path: Path, content: Content) -> Written:
    """Write ``content``, one after the other, and wait until the disk has it; a thread hashes beside the writing."""
    # Small stretches are gathered: every call of the system is a chance for two threads to wait for each other.
    with path.open("wb", buffering=SMALL) as file, ThreadPoolExecutor(1, "esper-hash") as thread:
        digests = []
        for piece in _cut(content, PIECE):
            small = sum(map(len, piece)) < SMALL  # a thread of its own costs more
            digests.append(_digest(piece) if small else thread.submit(_digest, piece))
            for part in piece:
                file.write(part)
        file.flush()
        os.fsync(file.fileno())
        size = sum(map(len, content))
        return Written(size, PIECE, tuple(digest if isinstance(digest, str) else digest.result() for digest in digests))


def read_bytes(path: Path, stated: Written) -> bytes:
    """The bytes of a file that is exactly as written. Raises ValueError for any other."""
    with path.open("rb") as file:
        _refuse_size(path, os.fstat(file.fileno()).st_size, stated)
        content = file.read()
    _refuse_other(path, memoryview(content), stated)
    return content


def map_bytes(path: Path, stated: Written) -> memoryview:
    """The bytes of a large file, mapped instead of copied, and checked on all cores. Raises ValueError like ``read_bytes``.

    Writing to them changes the memory and not the file. Copy bytes that are kept for longer than a moment: a later
    write to the file may show in them, and a file cut short ends the process.
    """
    with path.open("rb") as file:
        _refuse_size(path, os.fstat(file.fileno()).st_size, stated)
        content = memoryview(mmap.mmap(file.fileno(), stated.bytes, access=mmap.ACCESS_COPY) if stated.bytes else b"")
    _refuse_other(path, content, stated)
    return content


def written(path: Path) -> Written:
    """Size and digests of a file that something else has written."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")
        return Written(size, PIECE, tuple(map(_digest, _cut([content], PIECE))))


def _refuse_size(path: Path, size: int, stated: Written) -> None:
    if size != stated.bytes:
        raise ValueError(f"its {path.name} is {'truncated' if size < stated.bytes else 'longer than what was written'}")


def _refuse_other(path: Path, content: memoryview, stated: Written) -> None:
    pieces = list(_cut([content], stated.piece))
    if len(content) < SMALL:
        found = [_digest(piece) for piece in pieces]
    else:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "esper-hash") as threads:
            found = list(threads.map(_digest, pieces))
    if tuple(found) != stated.sha256:
        raise ValueError(f"its {path.name} is not what was written")


def _cut(content: Content, size: int) -> Iterator[list[memoryview]]:
    """``content`` in pieces of ``size`` bytes, each a list of stretches; nothing is copied."""
    piece: list[memoryview] = []
    room = size
    for part in content:
        left = memoryview(part)
        while left:
            piece.append(left[:room])
            left, room = left[room:], room - len(left[:room])
            if not room:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _digest(piece: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in piece:
        digest.update(part)
    return digest.hexdigest()


HEADER_LIMIT = 100 << 20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Written:
    """Write contiguous CPU tensors and wait until the disk has them."""
    header: dict[str, Any] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content: Content = [
        len(text).to_bytes(8, "little") + text,
        *(tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered if tensor.numel()),
    ]
    return write_bytes(path, content)


def parse_tensors(content: memoryview) -> dict[str, Tensor]:
    """Tensors that share the memory of ``content``. Raises ValueError for anything that is not whole and gapless."""
    if len(content) < 8:
        raise ValueError("the file is shorter than its header")
    length = int.from_bytes(content[:8], "little")
    if length > min(HEADER_LIMIT, len(content) - 8):
        raise ValueError("the header is longer than the file")
    header = json.loads(bytes(content[8 : 8 + length]))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    header.pop("__metadata__", None)
    data = content[8 + length :]
    entries = [_entry(name, entry) for name, entry in header.items()]
    position = 0
    tensors: dict[str, Tensor] = {}
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if start != position or end > len(data):
            raise ValueError(f"the bytes of '{name}' overlap, leave a gap or end beyond the file")
        position = end
        flat = torch.frombuffer(data[start:end], dtype=dtype) if end > start else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    if position != len(data):
        raise ValueError("the file goes on behind its last tensor")
    return tensors


def _entry(name: str, entry: Any) -> tuple[str, torch.dtype, list[int], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in DTYPES:
        raise ValueError(f"the header's entry '{name}' is not understood")
    dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"the header's entry '{name}' has no shape and place")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape and size of '{name}' do not agree")
    return name, dtype, shape, start, end


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's list of names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
