"""CIFAR-10 is read from the standard binary files, and anything wrong with them is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks.base import SETS
from esper.tasks.cifar10 import TEST, TRAIN, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    drawn = torch.Generator().manual_seed(0)
    for name in (*TRAIN, *TEST):
        pixels = torch.randint(0, 256, (20, 3072), generator=drawn)
        labels = (torch.arange(20) % 10).unsqueeze(1)
        (tmp_path / name).write_bytes(torch.cat([labels, pixels], 1).to(torch.uint8).numpy().tobytes())
    return tmp_path


def test_four_sets_out_of_the_binary_files(folder: Path) -> None:
    task = CONFIGS["cifar10"](path=str(folder), judge=20, validation=20).build()
    assert [len(getattr(task, which)) for which in SETS] == [60, 20, 20, 20]
    assert task.input_shape == (3, 32, 32) and task.outputs == 10
    pictures = torch.cat([getattr(task, which).inputs for which in SETS]).flatten(1)
    assert len(pictures.unique(dim=0)) == 120


def test_a_record_is_its_label_then_red_green_and_blue_rows(folder: Path) -> None:
    raw = (folder / TEST[0]).read_bytes()
    inputs, targets = read(folder, TEST)
    second = raw[3073:]
    assert int(targets[1]) == second[0]
    assert int(inputs[1, 2, 5, 7]) == second[1 + 2 * 1024 + 5 * 32 + 7]


def test_an_absent_file_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_batch_1.bin .*cifar-10-binary.tar.gz.*task.path="):
        CONFIGS["cifar10"](path=str(tmp_path)).build()


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    path = folder / TEST[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="no whole number of 3073-byte records"):
        CONFIGS["cifar10"](path=str(folder), judge=20, validation=20).build()
