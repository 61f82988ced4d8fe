"""Fashion-MNIST (Xiao et al. 2017): 70,000 real 28×28 images of clothes, from its four idx files."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import UserError
from esper.tasks.base import Task
from esper.tasks.classification import Samples, classification, divide
from esper.tasks.config import FashionMnistConfig

UNSIGNED_BYTE = 0x08
"""The idx format's code of the only type these files hold."""


def build(config: FashionMnistConfig) -> Task:
    """Read the four idx files.

    Raises:
        UserError: a file that is absent (with the install command), cut short or of another format.
    """
    folder = Path(config.path).expanduser()
    wanted = {"train": config.train, "judge": config.judge, "validation": config.validation}
    sets = divide(config.name, images(folder, "train"), config.split_seed, wanted)
    sets["test"] = images(folder, "t10k")
    return classification(config.name, sets, 10, "Fashion-MNIST, 28×28 grey")


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
