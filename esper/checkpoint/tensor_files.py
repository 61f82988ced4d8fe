"""Tensors on disk in the safetensors format.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors). It is written here because the engine runs where only torch is installed, and
because the hash, the file and the disk must not each cost a pass of their own.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.checkpoint.hashes import Content, Written, write_bytes

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
        *(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for _, tensor in ordered if tensor.numel()),
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
