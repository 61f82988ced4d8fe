"""Batches in an order that is a pure function of (seed, epoch), so a resume needs (epoch, position) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esper.errors import UserError
from esper.randomness import generator

Batch = Any


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The permutation of ``range(length)`` that this epoch follows; int64 ``[length]``."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


class Batches:
    """Any batch of any epoch by (epoch, position); ``len`` is batches an epoch.

    Asked in order it reads ahead (``num_workers`` > 0); a jump costs a restart of the read-ahead, never other bits.
    Workers change no bit for data sets whose samples depend on their index alone. Data sets with
    ``gather(indices)`` and ``to(device)`` are moved to ``device`` once and gathered there when there are no workers, unless they have
    ``lies_on(device)`` and it says no.

    A process that trains on a ``share`` of the batches (places among ``shares`` neighbours) reads ahead its own alone.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        collate: Callable[[Any], Batch],
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        share: range | None = None,
        shares: int = 1,
    ) -> None:
        """Raises ``UserError`` when a batch is larger than the data set and partial batches are dropped."""
        self.length = len(dataset)  # type: ignore[arg-type]
        if self.length == 0 or (drop_last and self.length < batch_size):
            raise UserError(f"batches of {batch_size} cannot be made from {self.length} samples; lower the batch size or use more data.")
        self.batch_size, self.seed, self.collate = batch_size, seed, collate
        self.device = _indexed(torch.device(device))
        self.shuffle = shuffle
        self._share, self._shares = share or range(1), shares
        self._count = self.length // batch_size if drop_last else -(-self.length // batch_size)
        self._order: tuple[int, Tensor] | None = None
        whole: Any = dataset
        movable = hasattr(whole, "gather") and hasattr(whole, "to") and getattr(whole, "lies_on", _anywhere)(self.device)
        self._resident = num_workers == 0 and movable
        self.dataset: Any = whole.to(self.device) if self._resident else dataset
        self._reader = _Reader(self, num_workers) if num_workers > 0 else None

    def __len__(self) -> int:
        return self._count

    def indices(self, epoch: int, position: int) -> Tensor:
        """Which samples are in the batch at ``position`` of ``epoch``; int64 ``[N]``."""
        assert 0 <= position < self._count, (position, self._count)
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self.length, self.seed, epoch) if self.shuffle else torch.arange(self.length)
            self._order = (epoch, order.to(self.device) if self._resident else order)
        start = position * self.batch_size
        return self._order[1][start : start + self.batch_size]

    def batch(self, epoch: int, position: int) -> Batch:
        """The batch at ``position`` (0-based) of ``epoch`` (0-based), on the device."""
        if self._reader is not None:
            return self._moved(self._reader.batch(epoch, position))
        chosen = self.indices(epoch, position)
        if self._resident:
            return self.collate(self.dataset.gather(chosen))
        return self._moved(self.collate(fetch(self.dataset, chosen.tolist())))

    def at(self, step: int) -> Batch:
        """The batch of the 0-based ``step``, counted from the first batch of epoch 0."""
        return self.batch(*divmod(step, self._count))

    def following(self, step: int) -> int:
        """The step after a step that a process with this share comes to."""
        return next(number for number in count(step + 1) if number % self._shares in self._share)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """All batches of one epoch in order."""
        return (self.batch(epoch, position) for position in range(self._count))

    def close(self) -> None:
        """End the workers, if there are any; asking for a batch starts them again."""
        if self._reader is not None:
            self._reader.close()

    def _moved(self, batch: Batch) -> Batch:
        return tuple(part.to(self.device, non_blocking=True) for part in batch)


def fetch(dataset: Any, indices: list[int]) -> Any:
    """The samples at ``indices``, at once where the data set can (``__getitems__``), else as a list."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


class _Reader:
    """Worker processes that read ahead from wherever the last jump went."""

    def __init__(self, batches: Batches, num_workers: int) -> None:
        self._batches = batches
        self._workers = num_workers
        self._next: int | None = None
        self._ahead: Iterator[Batch] | None = None

    def batch(self, epoch: int, position: int) -> Batch:
        step = epoch * len(self._batches) + position
        if self._next != step or self._ahead is None:
            self.close()
            self._ahead = iter(self._loader(epoch, position))
        self._next = self._batches.following(step)
        return next(self._ahead)

    def close(self) -> None:
        """Ends the workers: dropping a loader's iterator shuts them down and discards batches that were read ahead."""
        self._ahead = None

    def _loader(self, epoch: int, position: int) -> DataLoader[Batch]:
        batches = self._batches
        return DataLoader(
            batches.dataset,
            batch_sampler=_From(batches, epoch, position),
            num_workers=self._workers,
            collate_fn=batches.collate,
            pin_memory=batches.device.type == "cuda",
            generator=generator(batches.seed, "workers", epoch, position),
        )


class _From:
    """Index lists from one (epoch, position) on, without end; those of the process's share."""

    def __init__(self, batches: Batches, epoch: int, position: int) -> None:
        self._batches, self._start = batches, (epoch, position)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = self._start
        step = epoch * len(self._batches) + position
        while True:
            yield self._batches.indices(*divmod(step, len(self._batches))).tolist()
            step = self._batches.following(step)


def _anywhere(device: torch.device) -> bool:
    return True


def _indexed(device: torch.device) -> torch.device:
    """``cuda`` with its index, so that it compares equal to the device that tensors report."""
    return torch.empty(0, device=device).device
