"""MNIST-1D comes from its authors' generator, as published."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from esper.errors import UserError
from esper.tasks import CONFIGS
from esper.tasks.base import SETS
from esper.tasks.mnist1d import generated, published


@pytest.mark.slow
def test_train_and_test_are_the_published_samples_up_to_shift_and_scale() -> None:
    from mnist1d.data import get_dataset_args, make_dataset

    kept = np.random.get_state()
    theirs = make_dataset(get_dataset_args())
    np.random.set_state(kept)
    for (inputs, targets), part in zip(published(), ("", "_test"), strict=True):
        assert torch.equal(targets, torch.from_numpy(theirs[f"y{part}"]).long())
        ours, reference = inputs.squeeze(1).double().numpy(), theirs[f"x{part}"]
        scale, shift = np.polyfit(ours.ravel(), reference.ravel(), 1)
        assert np.allclose(ours * scale + shift, reference, atol=1e-4)


def test_sizes_and_disjoint_sets() -> None:
    task = CONFIGS["mnist1d"](judge=300, validation=200).build()
    assert [len(getattr(task, which)) for which in SETS] == [4000, 300, 200, 1000]
    assert task.input_shape == (1, 40) and task.outputs == 10
    series = torch.cat([getattr(task, which).inputs for which in SETS])
    assert len(series.flatten(1).unique(dim=0)) == 5500


def test_the_split_seed_draws_judge_and_validation_and_leaves_test_alone() -> None:
    one, other = (CONFIGS["mnist1d"](split_seed=seed, judge=100, validation=100).build() for seed in (0, 1))
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert not torch.equal(one.judge.inputs, other.judge.inputs)
    assert CONFIGS["mnist1d"](judge=100, validation=100).build().digest == one.digest


def test_numpys_global_generator_is_put_back() -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    generated(20, 0)
    assert np.random.rand() == expected


def test_an_absent_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    with pytest.raises(UserError, match="pip install mnist1d"):
        CONFIGS["mnist1d"]().build()
