"""CIFAR-10 (Krizhevsky 2009): 60,000 real 32×32 colour images, from a local copy of the binary version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from esper.errors import UserError
from esper.fields import setting
from esper.tasks.base import Task
from esper.tasks.classification import Samples, classification, divide

RECORD = 1 + 3 * 32 * 32
"""Bytes of one image: its label, then the red, green and blue planes, row by row."""
TRAIN = tuple(f"data_batch_{part}.bin" for part in range(1, 6))
TEST = ("test_batch.bin",)


@dataclass
class Cifar10Config:
    """45,000 / 2,500 / 2,500 images out of the five training files, and the 10,000 of the test file."""

    name: str = "cifar10"
    path: str = setting("data/cifar-10-batches-bin", help="folder of data_batch_1.bin … 5.bin and test_batch.bin")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=50000, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(2500, low=10, high=50000, unit="samples", help="samples that gates are decided on")
    validation: int = setting(2500, low=10, high=50000, unit="samples", help="samples of the curves")

    def build(self) -> Task:
        """Read the six binary files.

        Raises:
            UserError: a file that is absent (and how to get it) or no whole number of records long.
        """
        folder = Path(self.path).expanduser()
        wanted = {"train": self.train, "judge": self.judge, "validation": self.validation}
        sets = divide(self.name, read(folder, TRAIN), self.split_seed, wanted)
        sets["test"] = read(folder, TEST)
        return classification(self.name, sets, 10, "CIFAR-10, 32×32 colour")


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
