"""MNIST-1D (Greydanus & Kobak 2020): the ten digits as noisy series of 40 values, from the authors' generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from esper.extras import import_extra
from esper.randomness import seed_for
from esper.tasks.base import Task
from esper.tasks.classification import Samples, classification, divide
from esper.tasks.config import Mnist1dConfig

PUBLISHED_SEED = 42


def build(config: Mnist1dConfig) -> Task:
    """Run the generator with its published settings.

    Raises:
        UserError: the package ``mnist1d`` is not installed.
    """
    train, test = published()
    extra = -(-(config.judge + config.validation) // 10) * 10
    further = generated(extra, seed_for(config.split_seed, "mnist1d") % 2**32)
    sets = divide(config.name, further, config.split_seed, {"judge": config.judge, "validation": config.validation})
    sets |= divide(config.name, train, config.split_seed, {"train": config.train})
    return classification(config.name, sets | {"test": test}, 10, "MNIST-1D, series of 40 values")


def published() -> tuple[Samples, Samples]:
    """The published training and test samples, up to the shift and scale that the generator ends with."""
    inputs, targets = generated(5000, PUBLISHED_SEED)
    return (inputs[:4000], targets[:4000]), (inputs[4000:], targets[4000:])


def generated(count: int, seed: int) -> Samples:
    """``count`` samples, as many of each class, not normalised: float32 ``[count, 1, 40]``, int64 ``[count]``.

    The steps of the package's ``make_dataset`` in its order of draws, without its last step: that one shifts and
    scales by statistics of all samples together, and here only the training set may decide these.
    """
    return _generated(count, seed, *_generator())


@lru_cache(maxsize=4)  # seconds of work, and the jobs of a sweep ask for the same again in one process
def _generated(count: int, seed: int, data: Any, transform: Any) -> Samples:
    import numpy as np

    settings, templates = data.get_dataset_args(), data.get_templates()
    with _own_global_rng(seed):
        series = [transform(templates["x"][label], templates["t"], settings)[0] for label in range(10) for _ in range(count // 10)]
        order = np.random.permutation(len(series))
    targets = np.repeat(templates["y"], count // 10)[order]
    inputs = torch.from_numpy(np.stack(series)[order]).float().unsqueeze(1)
    return inputs, torch.from_numpy(targets).long()


def _generator() -> tuple[Any, Any]:
    import_extra("mnist1d", "task=mnist1d", "mnist1d")
    from mnist1d import data
    from mnist1d.transform import transform

    return data, transform


@contextmanager
def _own_global_rng(seed: int) -> Iterator[None]:
    """The package draws from numpy's global generator: seed it, and put its state back."""
    import numpy as np

    kept = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(kept)
