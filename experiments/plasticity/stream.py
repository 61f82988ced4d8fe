"""A stream of tasks made of one small data set, seen online: every sample once a task, predicted before it is learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from esper.randomness import generator

KINDS = ("permuted", "shuffled")
"""``permuted``: a task has its own order of the 64 pixels. ``shuffled``: a task has its own meaning of the ten labels."""
BATCH = 32


@dataclass(frozen=True)
class Task:
    """One pass over the data: ``inputs`` ``[n, 64]``, ``labels`` ``[n]``, in the order in which they come."""

    inputs: Tensor
    labels: Tensor

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of BATCH samples; what is left over is dropped."""
        for start in range(0, len(self.labels) - BATCH + 1, BATCH):
            yield self.inputs[start : start + BATCH], self.labels[start : start + BATCH]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, ``[1797, 64]`` with mean 0 and variance 1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.tensor(found.data, dtype=torch.float32)
    return (inputs - inputs.mean()) / inputs.std(), torch.tensor(found.target)


def tasks(kind: str, count: int, seed: int) -> Iterator[Task]:
    """The tasks of a stream; the same seed gives the same stream to every arm."""
    inputs, labels = digits()
    draws = generator(seed, "data")
    for _ in range(count):
        order = torch.randperm(len(labels), generator=draws)
        pixels, meaning = torch.randperm(inputs.shape[1], generator=draws), torch.randperm(10, generator=draws)
        if kind == "permuted":
            yield Task(inputs[order][:, pixels], labels[order])
        else:
            yield Task(inputs[order], meaning[labels[order]])
