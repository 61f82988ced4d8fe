"""Measuring a model on a held-out set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds.sites import quiet_evaluation
from esper.tasks.base import Task
from esper.tasks.loading import Batches

LOGITS = 2**25
"""Logits of a batch that is measured, at most."""


def evaluate(model: nn.Module, task: Task, batches: Batches) -> dict[str, float]:
    """``loss`` and every metric of the task, as means over the samples of all batches (float64)."""
    sums: dict[str, float] = {}
    count = 0
    with quiet_evaluation(model):
        for batch in batches.epoch():
            output = model(batch[0])
            values: dict[str, Tensor] = {"loss": task.sample_loss(output, batch)}
            values |= {name: metric.compute(output, batch) for name, metric in task.metrics.items()}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            count += len(batch[1])
    return {name: total / count for name, total in sums.items()}


def held_out(task: Task, which: str, device: torch.device, batch_size: int = 512) -> Batches:
    """The batches of ``judge``, ``validation`` or ``test`` in their own order, of fewer samples where these have very many logits."""
    dataset = getattr(task, which)
    logits = task.outputs * (task.input_shape[0] if task.inputs == "tokens" else 1)
    batch_size = min(batch_size, max(1, LOGITS // logits))
    return Batches(dataset, batch_size, 0, task.collate, device=device, shuffle=False, drop_last=False)


class Repeated:
    """Batches as an iterable that can be gone through again and again, as a judge needs it."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self._batches.epoch()
