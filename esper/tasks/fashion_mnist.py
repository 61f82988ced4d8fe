"""Fashion-MNIST (Xiao et al. 2017): 70,000 real 28×28 images of clothes, from its four idx files."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import UserError
from esper.fields import setting
from esper.tasks.base import Task
from esper.tasks.classification import Samples, classification, divide

UNSIGNED_BYTE = 0x08
"""The idx format's code of the only type these files hold."""


@dataclass
class FashionMnistConfig:
    """55,000 / 2,500 / 2,500 images out of the training files, and the 10,000 of the test files."""

    name: str = "fashion_mnist"
    path: str = setting("/usr/share/datasets/fashion-mnist", help="folder of the idx files, gzipped or not")
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=60000, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(2500, low=10, high=60000, unit="samples", help="samples that gates are decided on")
    validation: int = setting(2500, low=10, high=60000, unit="samples", help="samples of the curves")

    def build(self) -> Task:
        """Read the four idx files.

        Raises:
            UserError: a file that is absent (with the install command), cut short or of another format.
        """
        folder = Path(self.path).expanduser()
        wanted = {"train": self.train, "judge": self.judge, "validation": self.validation}
        sets = divide(self.name, images(folder, "train"), self.split_seed, wanted)
        sets["test"] = images(folder, "t10k")
        return classification(self.name, sets, 10, "Fashion-MNIST, 28×28 grey")


def images(folder: Path, which: str) -> Samples:
    """Images uint8 ``[N, 1, H, W]`` and labels int64 ``[N]`` of the ``train`` or ``t10k`` files."""
    inputs = read_idx(_find(folder, f"{which}-images-idx3-ubyte"), 3)
    targets = read_idx(_find(folder, f"{which}-labels-idx1-ubyte"), 1)
    if len(inputs) != len(targets):
        raise UserError(
            f"task=fashion_mnist: {len(inputs)} images but {len(targets)} labels in the {which} files of {folder}; "
            "these files do not belong together."
        )
    return inputs.unsqueeze(1), targets.long()


def read_idx(path: Path, dims: int) -> Tensor:
    """The uint8 tensor in an idx file, gzipped if its name ends in ``.gz``.

    Format: two zero bytes, type, number of dimensions; each dimension as a big-endian uint32; then the bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"task=fashion_mnist cannot read {path}: {error}; install the files anew.") from error
    head = 4 + 4 * dims
    if raw[:4] != bytes([0, 0, UNSIGNED_BYTE, dims]) or len(raw) < head:
        raise UserError(f"task=fashion_mnist: {path} is no idx file of bytes in {dims} dimensions; install it anew.")
    shape = struct.unpack(f">{dims}I", raw[4:head])
    if len(raw) - head != torch.Size(shape).numel():
        raise UserError(f"task=fashion_mnist: {path} is cut short or too long for its shape {shape}; install it anew.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=head).view(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"task=fashion_mnist finds no {name}[.gz] in {folder}; run: apt-get install dataset-fashion-mnist, "
        "or give the folder of the idx files as task.path=…"
    )
