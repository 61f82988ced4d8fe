"""Checkpoints of a large model against copying, writing and reading the same bytes.

Saves a state of the size of a model with AdamW: the training thread's stall against a copy of those bytes in memory, the whole save
against writing those bytes to the same disk (both wait for it), and loading with all its checks against reading the file; once more with
the copy into the model's tensors that follows either. Repetitions alternate, so that both sides see the same machine.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.checkpoint import disk
from esper.checkpoint.disk import Copy
from esper.checkpoint.tree import split
from scripts.benchmarks.checkpoint_parts.spent import Spent, spent

LIMITS = {"stall / copy": 1.2, "save / write": 1.3, "load / read": 1.3, "load and copy / read and copy": 1.3}


def state(parameters: int, device: torch.device) -> dict[str, object]:
    """A host of ``parameters`` numbers with AdamW's two moments, on ``device`` in tensors as a transformer has them."""
    width = 1024
    count = max(1, parameters // (width * width))
    return {
        "host": {f"layer{n}.weight": torch.randn(width, width, device=device) for n in range(count)},
        "optimizer": [
            {
                "step": torch.tensor(1.0),
                "exp_avg": torch.randn(width, width, device=device),
                "exp_avg_sq": torch.rand(width, width, device=device),
            }
            for _ in range(count)
        ],
    }


def measure(parameters: int, repeats: int, folder: Path, device: torch.device) -> dict[str, list[Spent]]:
    """The ratios, one a repetition. For a GPU's tensors the copy that the stall is held against is one to the machine's memory."""
    tree = state(parameters, device)
    _, tensors = split(tree)
    pieces = [memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors.values()]
    raw, kept = folder / "raw", folder / "checkpoints"
    ratios: dict[str, list[Spent]] = {name: [] for name in LIMITS}
    for repeat in range(repeats + 1):  # the first touches memory and disk for the first time
        taken: list[Copy] = []
        if repeat % 2:  # whoever comes second may get memory that the first has just given back
            copy = spent(lambda: [in_memory(tensor) for tensor in tensors.values()])
        stall = spent(lambda taken=taken: taken.append(disk.copy(tree, 1, 1, {}, None)))
        if not repeat % 2:
            copy = spent(lambda: [in_memory(tensor) for tensor in tensors.values()])
        if repeat % 2:  # a disk that was given much is slower for a while
            save = spent(lambda taken=taken: disk.write(taken[0], kept))
        write = spent(lambda: write_raw(raw, pieces))
        if not repeat % 2:
            save = spent(lambda taken=taken: disk.write(taken[0], kept))
        taken.clear()
        read, load = spent(lambda: read_raw(raw)), spent(lambda: loaded(kept))
        both = spent(lambda: take_over(tensors, read_raw(raw))), spent(lambda: _copy(loaded(kept), tensors))
        shutil.rmtree(kept)
        raw.unlink()
        if repeat:
            found = (stall.over(copy), save.over(write), load.over(read), both[1].over(both[0]))
            for name, ratio in zip(LIMITS, found, strict=True):
                ratios[name].append(ratio)
    return ratios


def in_memory(tensor: Tensor) -> Tensor:
    """A copy in the machine's memory."""
    return tensor.cpu() if tensor.is_cuda else tensor.clone()


def write_raw(path: Path, pieces: list[memoryview]) -> None:
    """The same bytes, as plainly as can be, and wait for the disk."""
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            left = piece
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def read_raw(path: Path) -> bytearray:
    """The same bytes into memory."""
    content = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        view, position = memoryview(content), 0
        while position < len(content):
            position += file.readinto(view[position : position + (16 << 20)]) or len(content)
    return content


def take_over(model: dict[str, Tensor], content: bytearray) -> None:
    """Copy bytes that were read into the model's tensors."""
    position = 0
    for tensor in model.values():
        end = position + tensor.numel() * tensor.element_size()
        tensor.copy_(torch.frombuffer(memoryview(content)[position:end], dtype=tensor.dtype).reshape(tensor.shape))
        position = end


def loaded(folder: Path) -> dict[str, Tensor]:
    """The tensors of the only checkpoint in ``folder`` by name."""
    return _by_name(disk.read(disk.checkpoints(folder)[0])[1], "")


def _by_name(tree: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a tree, named as ``split`` names them, but not copied."""
    if isinstance(tree, Tensor):
        return {path: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: value for key, part in parts for name, value in _by_name(part, f"{path}/{key}" if path else str(key)).items()}


def _copy(values: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    for name, tensor in model.items():
        tensor.copy_(values[name])
