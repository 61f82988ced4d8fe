"""Evaluation: measuring held-out sets, the outcome of a training, and its fingerprint."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.distributed import Ranks
from esper.distributed.sharding import let_go
from esper.seeds.sites import quiet_evaluation
from esper.tasks.base import Task
from esper.tasks.loading import Batches

LOGITS = 2**25
"""Logits of a batch that is measured, at most."""


def evaluate(model: nn.Module, task: Task, batches: Batches, ranks: Ranks | None = None) -> dict[str, float]:
    """``loss`` and every metric of the task, as means over the samples of all batches (float64).

    Each of several ``ranks`` measures a share of the batches, of a sharded host in as many passes as every other. The sums
    run over all of them in their order, wherever they were measured.
    """
    ranks = ranks or Ranks.alone()
    samples_of, names, sums_of = [], ["loss", *task.metrics], []
    with quiet_evaluation(model):
        for position in range(ranks.rank, len(batches), ranks.size):
            batch = batches.batch(0, position)
            output = model(batch[0])
            values = [task.sample_loss(output, batch), *(metric.compute(output, batch) for metric in task.metrics.values())]
            samples_of.append(len(batch[1]))
            sums_of.append(torch.stack([value.double().sum() for value in values]))
        if ranks.sharded and 0 < len(batches) % ranks.size <= ranks.rank:
            model(batches.batch(0, len(batches) - 1)[0])  # the last batches of the others take this rank too
        let_go(model)
    found_here = torch.stack(sums_of).tolist() if sums_of else []  # a GPU is waited for once
    mine = [(samples, dict(zip(names, found, strict=True))) for samples, found in zip(samples_of, found_here, strict=True)]
    shares = ranks.values("an evaluation", mine)
    sums: dict[str, float] = {}
    count = 0
    for position in range(len(batches)):
        samples, found = shares[position % ranks.size][position // ranks.size]
        count += samples
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: total / count for name, total in sums.items()}


def held_out(task: Task, which: str, device: torch.device, batch_size: int = 512) -> Batches:
    """The batches of the ``judge``, ``validation`` or ``test`` set, in the order of the data, smaller where they have very many logits."""
    dataset = getattr(task, which)
    logits = task.outputs * (task.input_shape[0] if task.inputs == "tokens" else 1)
    batch_size = min(batch_size, max(1, LOGITS // logits))
    return Batches(dataset, batch_size, 0, task.collate, device=device, shuffle=False, drop_last=False)


class Repeated:
    """Batches that can be iterated any number of times, as a judge does."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self._batches.epoch()


@dataclass
class Outcome:
    """Result of a training: held-out measurements, history ``(tick, name, value)`` and optimizer steps. ``test/…`` is there at the end."""

    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, str, float]] = field(default_factory=list)
    steps: int = 0

    def state(self) -> dict[str, Any]:
        """The measurements so far, for a checkpoint."""
        return {"steps": self.steps, "best": dict(self.best), "history": _packed(self.history)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.steps = int(state["steps"])
        self.best = {name: float(value) for name, value in state["best"].items()}
        self.history = _unpacked(state["history"])


def _packed(history: list[tuple[int, str, float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for _, name, _ in history))
    index = {name: number for number, name in enumerate(names)}
    return {
        "names": names,
        "ticks": torch.tensor([tick for tick, _, _ in history], dtype=torch.int64),
        "which": torch.tensor([index[name] for _, name, _ in history], dtype=torch.int32),
        "values": torch.tensor([value for _, _, value in history], dtype=torch.float64),
    }


def _unpacked(saved: dict[str, Any]) -> list[tuple[int, str, float]]:
    columns: list[Tensor] = [saved["ticks"], saved["which"], saved["values"]]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(tick, saved["names"][which], value) for tick, which, value in rows]


def fingerprint(weights: Mapping[str, Tensor], history: Iterable[tuple[int, str, float]]) -> str:
    """SHA-256, in hexadecimal, over final weights and metric history.

    Args:
        weights: parameters and buffers by name, any shape, dtype and device; order does not count, bits do.
        history: ``(tick, name, value)`` in the order it was recorded. Values measured with a clock do not belong in it:
            leave them out (``untimed``).
    """
    digest = hashlib.sha256(b"esper fingerprint 1\n")
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        _text(digest, f"{name} {tensor.dtype!s} {tuple(tensor.shape)}")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    for tick, name, value in history:
        _text(digest, name)
        digest.update(struct.pack("<qd", tick, value))
    return digest.hexdigest()


def untimed(history: Iterable[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """The history without values measured with a clock: names whose last part holds ``seconds`` or ``per_second``."""
    return [item for item in history if "second" not in item[1].rsplit("/", 1)[-1]]


def _text(digest: hashlib._Hash, text: str) -> None:
    data = text.encode()
    digest.update(struct.pack("<q", len(data)) + data)
