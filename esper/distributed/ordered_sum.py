"""Sums whose order is fixed, so that they have the same bits wherever their parts were computed.

The parts are halved while their number is even, and what is left is added from left to right. A block of ``n / 2^k`` neighbours is then
a part of the sum of its own: ``2^k`` processes can add up a block each, and the sum of the blocks, in the same order, is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.errors import UserError

Parts = list[Tensor | None]


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    if len(parts) > 1 and len(parts) % 2 == 0:
        middle = len(parts) // 2
        return ordered_sum(parts[:middle]) + ordered_sum(parts[middle:])
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class OrderedSum:
    """Sums lists of tensors as they come, each list a part; ``result`` after ``parts`` of them.

    A None stands for a tensor of zeros; only where all parts have None at a place the result has None too. At most ``log2(parts) + 2``
    lists are held.
    """

    def __init__(self, parts: int) -> None:
        self._run = parts
        while self._run % 2 == 0:
            self._run //= 2
        self._stack: list[tuple[int, Parts]] = []

    def add(self, tensors: Parts) -> None:
        """Take the next list, whose tensors become the sum's own."""
        self._stack.append((1, tensors))
        while len(self._stack) > 1 and self._joins(self._stack[-2][0], self._stack[-1][0]):
            (left, first), (right, second) = self._stack[-2:]
            self._stack[-2:] = [(left + right, [_plus(a, b) for a, b in zip(first, second, strict=True)])]

    def _joins(self, left: int, right: int) -> bool:
        """Whether two neighbours are added up: a run from left to right, whole runs by halves."""
        return right == 1 if left < self._run else left == right

    @property
    def result(self) -> Parts:
        """The sum."""
        assert len(self._stack) == 1, "other parts than were announced"
        return self._stack[0][1]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        one = b if a is None else a
        return None if one is None else one + torch.zeros_like(one)
    return a + b


def refuse_uneven(parts: int, processes: int) -> None:
    """Raise UserError for a number of processes among which the parts of a global batch cannot be shared out."""
    accepted = [1]
    while parts % (2 * accepted[-1]) == 0:
        accepted.append(2 * accepted[-1])
    accepted = sorted({*accepted, parts})
    if processes not in accepted:
        counts = ", ".join(map(str, accepted[:-1])) + " or " * (len(accepted) > 1) + str(accepted[-1])
        raise UserError(
            f"A global batch of trainer.accumulate={parts} micro-batches can be shared out among {counts} processes, and these are "
            f"{processes}: change torchrun's --nproc-per-node, or use trainer.accumulate={processes} or a multiple by a power of two."
        )
