"""Fashion-MNIST is read from idx files, and anything wrong with them is said."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks.base import SETS
from esper.tasks.fashion_mnist import images, read_idx


def write(path: Path, values: torch.Tensor) -> None:
    head = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    raw = head + values.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn = torch.Generator().manual_seed(0)
    for which, count, ending in (("train", 120, ".gz"), ("t10k", 40, "")):
        write(tmp_path / f"{which}-images-idx3-ubyte{ending}", torch.randint(0, 256, (count, 28, 28), generator=drawn))
        write(tmp_path / f"{which}-labels-idx1-ubyte{ending}", torch.arange(count) % 10)
    return tmp_path


def test_four_sets_out_of_the_idx_files_gzipped_or_not(folder: Path) -> None:
    task = CONFIGS["fashion_mnist"](path=str(folder), judge=20, validation=30).build()
    assert [len(getattr(task, which)) for which in SETS] == [70, 20, 30, 40]
    assert task.input_shape == (1, 28, 28)
    assert torch.equal(task.test.targets, torch.arange(40) % 10)
    pictures = torch.cat([getattr(task, which).inputs for which in SETS]).flatten(1)
    assert len(pictures.unique(dim=0)) == 160
    assert CONFIGS["fashion_mnist"](path=str(folder), judge=20, validation=30).build().digest == task.digest


def test_pixels_come_through_unchanged(folder: Path) -> None:
    raw, labels = images(folder, "t10k")
    drawn = torch.Generator().manual_seed(0)
    torch.randint(0, 256, (120, 28, 28), generator=drawn)
    assert torch.equal(raw.squeeze(1), torch.randint(0, 256, (40, 28, 28), generator=drawn).to(torch.uint8))
    assert labels.dtype == torch.int64


def test_absent_files_are_an_error_with_the_install_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        CONFIGS["fashion_mnist"](path=str(tmp_path / "nowhere")).build()


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        read_idx(path, 3)


def test_another_format_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no idx file"):
        read_idx(folder / "t10k-labels-idx1-ubyte", 3)


def test_a_broken_gzip_is_refused(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot read"):
        read_idx(path, 1)


def test_a_gzip_that_is_whole_but_wrong_inside_is_refused(folder: Path) -> None:
    path = folder / "train-labels-idx1-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[12:30] = b"\xff" * 18
    path.write_bytes(raw)
    with pytest.raises(UserError, match="cannot read"):
        read_idx(path, 1)


def test_labels_of_other_images_are_refused(folder: Path) -> None:
    write(folder / "t10k-labels-idx1-ubyte", torch.arange(39) % 10)
    with pytest.raises(UserError, match="40 images but 39 labels"):
        images(folder, "t10k")
