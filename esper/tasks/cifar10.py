"""CIFAR-10 (Krizhevsky 2009): 60,000 real 32×32 colour images, from a local copy of the binary version."""

from __future__ import annotations

from pathlib import Path

import torch

from esper.errors import UserError
from esper.tasks.base import Task
from esper.tasks.classification import Samples, classification, divide
from esper.tasks.config import Cifar10Config

RECORD = 1 + 3 * 32 * 32
"""Bytes of one image: its label, then the red, green and blue planes, row by row."""
TRAIN = tuple(f"data_batch_{part}.bin" for part in range(1, 6))
TEST = ("test_batch.bin",)


def build(config: Cifar10Config) -> Task:
    """Read the six binary files.

    Raises:
        UserError: a file that is absent (and how to get it) or no whole number of records long.
    """
    folder = Path(config.path).expanduser()
    wanted = {"train": config.train, "judge": config.judge, "validation": config.validation}
    sets = divide(config.name, read(folder, TRAIN), config.split_seed, wanted)
    sets["test"] = read(folder, TEST)
    return classification(config.name, sets, 10, "CIFAR-10, 32×32 colour")


def read(folder: Path, names: tuple[str, ...]) -> Samples:
    """Images uint8 ``[N, 3, 32, 32]`` and labels int64 ``[N]`` of the named files, one after the other."""
    records = torch.cat([_records(folder / name) for name in names])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _records(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise UserError(
            f"task=cifar10 finds no {path.name} in {path.parent}; download the binary version, cifar-10-binary.tar.gz, "
            "from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and give its folder as "
            "task.path=…/cifar-10-batches-bin"
        )
    raw = path.read_bytes()
    if not raw or len(raw) % RECORD:
        raise UserError(
            f"task=cifar10: {path} has {len(raw)} bytes, no whole number of {RECORD}-byte records; it is cut "
            "short or not the binary version: download it anew."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, RECORD)
