"""The default task: real digits in four sets that never change."""

from __future__ import annotations

import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks.base import SETS

DIGEST = "a06cbefc9d3a3ee472f3c6c44b12b81fce8e8888db9616c23b024d48cd6bceae"


def test_four_sets_of_the_stated_sizes_with_a_fixed_digest() -> None:
    task = CONFIGS["digits"]().build()
    assert [len(getattr(task, which)) for which in SETS] == [1000, 250, 250, 297]
    assert task.input_shape == (1, 8, 8) and task.outputs == 10 and task.inputs == "real"
    assert task.primary == "accuracy" and task.metrics["accuracy"].direction == "max"
    assert task.digest == DIGEST


def test_no_image_is_in_two_sets() -> None:
    task = CONFIGS["digits"]().build()
    images = [{row.numpy().tobytes() for row in getattr(task, which).inputs} for which in SETS]
    assert sum(map(len, images)) == len(set.union(*images)) == 1797


def test_every_set_has_every_class_in_its_share() -> None:
    task = CONFIGS["digits"]().build()
    for which in SETS:
        counts = getattr(task, which).targets.bincount(minlength=10).float()
        assert float((counts / counts.sum()).sub(0.1).abs().max()) < 0.015


def test_the_split_depends_on_its_own_seed_alone() -> None:
    torch.manual_seed(1)
    first = CONFIGS["digits"]().build()
    torch.manual_seed(2)
    assert CONFIGS["digits"]().build().digest == first.digest
    assert CONFIGS["digits"](split_seed=1).build().digest != first.digest


def test_fewer_training_samples_can_be_asked_for() -> None:
    task = CONFIGS["digits"](train=100).build()
    assert len(task.train) == 100 and len(task.test) == 297


def test_without_the_file_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.tasks.digits.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        CONFIGS["digits"]().build()
