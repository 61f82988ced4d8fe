"""``task_of``: a task from four data sets of the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from esper.errors import UserError
from esper.tasks.base import SETS, Batch, Metric, Task
from esper.tasks.classification import correct, sample_loss

#: Samples of each set that the digest covers, evenly spaced.
DIGESTED = 256


def task_of(
    name: str,
    train: Dataset[Any],
    judge: Dataset[Any],
    validation: Dataset[Any],
    test: Dataset[Any],
    *,
    outputs: int,
    loss: Callable[[Tensor, Batch], Tensor] = sample_loss,
    metrics: Mapping[str, tuple[str, Callable[[Tensor, Batch], Tensor]]] | None = None,
    primary: str = "",
    collate: Callable[[list[Any]], Any] = default_collate,
    description: str = "",
) -> Task:
    """A task over four disjoint sets of ``(input, target)`` samples; without ``loss`` and ``metrics`` it is a classification.

    Args:
        outputs: classes, size of the vocabulary, or what else the host has to give a sample.
        loss: ``(output, batch) -> Tensor[N]``, one value a sample.
        metrics: name -> ``("max" or "min", (output, batch) -> Tensor[N])``.
        primary: the metric that runs are compared by; default the first.
        collate: a list of samples to a batch ``(inputs, targets)``.

    Raises:
        UserError: an empty set, samples that are no pairs of tensors, a direction or a primary that there is not.
    """
    sets: dict[str, Any] = dict(zip(SETS, (train, judge, validation, test), strict=True))
    for which, dataset in sets.items():
        if len(dataset) == 0:
            raise UserError(f"task={name}: the {which} set is empty; train, judge, validation and test each need samples.")
    chosen = metrics or {"accuracy": ("max", correct)}
    for metric, (direction, _) in chosen.items():
        if direction not in ("max", "min"):
            raise UserError(f"task={name}: the direction of '{metric}' is '{direction}'; it is max or min.")
    primary = primary or next(iter(chosen))
    if primary not in chosen:
        raise UserError(f"task={name}: primary='{primary}' is no metric; there are {', '.join(chosen)}.")
    inputs = _first_input(name, train, collate)
    return Task(
        name=name,
        **sets,
        collate=partial(_as_tuple, collate),
        sample_loss=loss,
        metrics={metric: Metric(direction, compute) for metric, (direction, compute) in chosen.items()},
        primary=primary,
        inputs="real" if inputs.is_floating_point() else "tokens",
        input_shape=tuple(inputs.shape[1:]),
        outputs=outputs,
        digest=_digest(sets, collate),
        description=description or ", ".join(f"{which} {len(dataset)}" for which, dataset in sets.items()),
    )


def _as_tuple(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Batch:
    inputs, targets = collate(samples)
    return inputs, targets


def _first_input(name: str, train: Dataset[Any], collate: Callable[[list[Any]], Any]) -> Tensor:
    batch = collate([train[0]])
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise UserError(f"task={name}: a sample must be (input, target), and a batch of them two tensors; give a collate that makes them.")
    inputs: Tensor = batch[0]
    return inputs


def _digest(sets: Mapping[str, Dataset[Any]], collate: Callable[[list[Any]], Any]) -> str:
    """SHA-256 over the sizes of the sets and up to ``DIGESTED`` samples of each."""
    digest = hashlib.sha256()
    for which, dataset in sets.items():
        length = len(dataset)  # type: ignore[arg-type]
        digest.update(f"{which} {length}\n".encode())
        for index in torch.linspace(0, length - 1, min(length, DIGESTED)).long().tolist():
            for part in collate([dataset[index]]):
                digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
                digest.update(memoryview(part.contiguous().cpu().numpy()).cast("B"))
    return digest.hexdigest()
