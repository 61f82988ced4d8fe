"""A task: four disjoint data sets, a loss per sample, metrics with a direction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.errors import UserError

Batch = tuple[Tensor, Tensor]
SETS = ("train", "judge", "validation", "test")


@dataclass(frozen=True)
class Metric:
    """One number a sample, ``compute(output, batch) -> Tensor[N]``; a set's value is the mean over its samples."""

    direction: str
    """``max`` when larger is better, else ``min``."""
    compute: Callable[[Tensor, Batch], Tensor]

    def __post_init__(self) -> None:
        assert self.direction in ("max", "min"), self.direction


@dataclass(frozen=True)
class Task:
    """The data, the loss and the metrics of a training.

    ``train`` is learnt from, ``judge`` decides gates, ``validation`` draws the curves, ``test`` is touched once: no
    sample is in two of them. A batch is ``(inputs, targets)``, samples first.
    """

    name: str
    train: Dataset[Any]
    judge: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    collate: Callable[[Any], Batch]
    sample_loss: Callable[[Tensor, Batch], Tensor]
    """``(output, batch) -> Tensor[N]``, float32 nats, before any mean over the batch."""
    metrics: Mapping[str, Metric]
    primary: str
    """The metric that runs are compared by; a key of ``metrics``."""
    inputs: str
    """``real`` (float32 ``input_shape`` a sample: channels first, then space) or ``tokens`` (int64)."""
    input_shape: tuple[int, ...]
    outputs: int
    """Classes, or size of the vocabulary."""
    digest: str
    """SHA-256 over the four sets as read, before normalisation."""
    description: str
    passes: int = 0
    """A run that needs more passes over ``train`` than this is refused; 0: any number will do."""
    preprocessing: Mapping[str, Any] | None = None
    """What turned the data into inputs, as plain values: it is kept with the run and beside its model. None where nothing is needed."""

    def __post_init__(self) -> None:
        assert self.primary in self.metrics, (self.primary, list(self.metrics))
        assert self.inputs in ("real", "tokens"), self.inputs


class InMemory(Dataset[Batch]):
    """Tensors held whole; a batch is one gather from each. Picklable, for loader workers."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        assert len(inputs) == len(targets), (len(inputs), len(targets))
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> Batch:
        """The batch at ``indices`` (int64 ``[N]``, on the data's device)."""
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.gather(torch.tensor(indices, device=self.targets.device))

    def to(self, device: torch.device) -> InMemory:
        """The same samples on ``device``; itself when they are there already."""
        if self.targets.device == device:
            return self
        return InMemory(self.inputs.to(device), self.targets.to(device))


def ready(batch: Batch) -> Batch:
    """The collate of data sets whose ``__getitems__`` makes the batch itself."""
    return batch


def logits(output: Any) -> Tensor:
    """``output`` in float32. Raises UserError where the model gave something else than a tensor, which no built-in loss can read."""
    if not isinstance(output, Tensor):
        raise UserError(
            f"The model gave a {type(output).__name__} where the task's loss reads a tensor of logits; have its forward return the "
            "logits alone, or give the task a loss of its own (docs/own-data.md)."
        )
    return output.float()


def digest_of(tensors: Sequence[Tensor]) -> str:
    """SHA-256 over type, shape and bytes of each tensor in turn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.contiguous().numpy().data).cast("B"))
    return digest.hexdigest()


def refuse_nonfinite(task: str, which: str, inputs: Tensor) -> None:
    """Raise ``UserError`` with set, number of samples and first index when an input is NaN or infinite."""
    if not inputs.is_floating_point():
        return
    bad = (~inputs.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"task={task}: {len(bad)} of the {len(inputs)} samples in the {which} set hold NaN or infinite values "
            f"(the first at index {int(bad[0])}); every input must be a finite number: repair or remove them."
        )
