"""Classification tasks: stratified disjoint sets, inputs normalised by the training set alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.errors import UserError
from esper.randomness import generator
from esper.tasks.base import SETS, Batch, InMemory, Metric, Task, digest_of, logits, ready, refuse_nonfinite

Samples = tuple[Tensor, Tensor]


def sample_loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats a sample, ``[N]``, of logits ``[N, classes]``."""
    return F.cross_entropy(logits(output), batch[1], reduction="none")


def correct(output: Tensor, batch: Batch) -> Tensor:
    """1.0 where the largest logit is the target's, else 0.0; ``[N]``."""
    return (output.argmax(1) == batch[1]).float()


def stratified(targets: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Disjoint index sets of the given sizes, each with the classes in the proportions of the whole (± 1).

    Every class is shuffled and its members spread evenly over [0, 1); all classes together, sorted by that place, are
    cut into consecutive sets. A pure function of ``targets``, ``sizes`` and ``seed``. Indices come sorted.
    """
    assert sum(sizes) <= len(targets), (sizes, len(targets))
    shuffled = torch.randperm(len(targets), generator=generator(seed, "split"))
    place = torch.empty(len(targets), dtype=torch.float64)
    for label in targets.unique():
        members = shuffled[targets[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    spread = shuffled[place[shuffled].argsort(stable=True)]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [spread[start:end].sort().values for start, end in pairwise(ends)]


def divide(task: str, samples: Samples, seed: int, wanted: Mapping[str, int]) -> dict[str, Samples]:
    """Named stratified sets out of one pool; ``train`` takes what the others leave when its size is 0.

    Raises:
        UserError: when the sizes ask for more samples than there are.
    """
    inputs, targets = samples
    rest = len(targets) - sum(wanted.values())
    asked = " + ".join(f"{name}={size}" for name, size in wanted.items() if size)
    if rest < 0 or (wanted.get("train") == 0 and rest == 0):
        raise UserError(
            f"task={task}: {asked} asks for {sum(wanted.values())} of {len(targets)} samples and leaves nothing to train on; ask for fewer."
        )
    sizes = {name: size or rest for name, size in wanted.items()}
    parts = stratified(targets, list(sizes.values()), seed)
    return {name: (inputs[part], targets[part]) for name, part in zip(sizes, parts, strict=True)}


def classification(name: str, sets: Mapping[str, Samples], classes: int, description: str) -> Task:
    """The task over the four raw sets: ``inputs [N, channels, *space]`` of any type, ``targets [N]`` int64.

    Raises:
        UserError: a label out of range, or an input that is no finite number.
    """
    for which in SETS:
        inputs, targets = sets[which]
        refuse_nonfinite(name, which, inputs)
        if len(targets) == 0 or int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise UserError(f"task={name}: the {which} set is empty or has labels outside 0..{classes - 1}.")
    mean, deviation = channel_statistics(sets["train"][0])
    data: dict[str, Any] = {which: InMemory((sets[which][0].float() - mean) / deviation, sets[which][1]) for which in SETS}
    return Task(
        name=name,
        **data,
        collate=ready,
        sample_loss=sample_loss,
        metrics={"accuracy": Metric("max", correct)},
        primary="accuracy",
        inputs="real",
        input_shape=tuple(sets["train"][0].shape[1:]),
        outputs=classes,
        digest=digest_of([tensor for which in SETS for tensor in sets[which]]),
        description=f"{description}; " + ", ".join(f"{which} {len(sets[which][1])}" for which in SETS),
    )


def channel_statistics(inputs: Tensor) -> Samples:
    """Mean and standard deviation of each channel, float32, shaped to broadcast over ``[N, channels, *space]``.

    Summed in float64, so that the number of threads leaves no trace in the float32 result.
    """
    dims = [0, *range(2, inputs.dim())]
    shape = (1, -1, *([1] * (inputs.dim() - 2)))
    wide = inputs.double()
    mean, deviation = wide.mean(dims).view(shape), wide.std(dims, correction=0).view(shape)
    return mean.float(), torch.where(deviation > 0, deviation, torch.ones_like(deviation)).float()
