"""Batches are a pure function of (seed, epoch, position), with workers or without."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, default_collate

from esper.errors import UserError
from esper.tasks.base import InMemory, ready
from esper.tasks.loading import Batches, epoch_order


def data(count: int = 100) -> InMemory:
    return InMemory(torch.arange(count, dtype=torch.float32).unsqueeze(1) * 2, torch.arange(count))


class OneByOne(Dataset):
    """A user's data set: no batch access, a device of no interest."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(index)), index


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    batches = Batches(data(), 10, seed=4, collate=ready)
    epochs = [torch.cat([targets for _, targets in batches.epoch(epoch)]) for epoch in (0, 1)]
    assert len(batches) == 10
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], epoch_order(100, 4, 0))
    assert not torch.equal(epochs[0], epoch_order(100, 5, 0))


def test_inputs_and_targets_stay_together() -> None:
    inputs, targets = Batches(data(), 16, seed=0, collate=ready).batch(3, 2)
    assert torch.equal(inputs.squeeze(1), targets * 2.0)


def test_resuming_needs_only_epoch_and_position() -> None:
    whole = Batches(data(), 16, seed=1, collate=ready)
    history = [whole.at(step)[1] for step in range(20)]
    resumed = Batches(data(), 16, seed=1, collate=ready)
    assert torch.equal(resumed.batch(*divmod(13, len(resumed)))[1], history[13])
    assert torch.equal(resumed.at(14)[1], history[14])


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("dataset", [data(50), OneByOne()], ids=["in memory", "one by one"])
def test_four_workers_give_the_same_bits_across_epochs_and_jumps(dataset: Dataset) -> None:
    collate = ready if isinstance(dataset, InMemory) else default_collate
    alone = Batches(dataset, 8, seed=2, collate=collate)
    many = Batches(dataset, 8, seed=2, collate=collate, num_workers=4)
    for step in (0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 3):
        for expected, found in zip(alone.at(step), many.at(step), strict=True):
            assert torch.equal(expected, found)
    many.close()


@pytest.mark.usefixtures("processes")
def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    for workers in (0, 2):
        batches = Batches(data(), 10, seed=0, collate=ready, num_workers=workers)
        batches.at(0)
        batches.close()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training_drops_the_partial_batch_and_judging_keeps_it_in_order() -> None:
    assert len(Batches(data(25), 10, seed=0, collate=ready)) == 2
    judging = Batches(data(25), 10, seed=0, collate=ready, shuffle=False, drop_last=False)
    assert torch.equal(torch.cat([targets for _, targets in judging.epoch()]), torch.arange(25))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="batches of 64 cannot be made from 25 samples"):
        Batches(data(25), 64, seed=0, collate=ready)


class Counting(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_batch_from_memory_is_gathered_at_once_and_not_sample_by_sample() -> None:
    """What it costs in seconds is for `scripts/bench calls`."""
    batches = Batches(InMemory(torch.zeros(1000, 1, 8, 8), torch.zeros(1000, dtype=torch.int64)), 64, 0, ready)
    batches.at(0)
    with Counting() as counted:
        batches.at(1)
    assert counted.operations <= 6


@pytest.mark.usefixtures("processes")
def test_loading_imports_torch_and_the_standard_library_alone() -> None:
    program = (
        "import sys; import torch; before = set(sys.modules); import esper.tasks.loading, esper.hosts;"
        "extra = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "assert extra <= {'torch', 'esper'}, extra"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
