"""A global batch: a fixed number of micro-batches, shared out among the processes, whose gradients are added up in a fixed order.

Every micro-batch begins with the same weights, norm statistics and random draws wherever it is computed: the draws depend on the run's
seed, the step and the micro-batch alone, and the norm statistics that the step leaves are the mean of those of its micro-batches. So a
step has the same bits on every number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper.distributed import OrderedSum, Ranks, refuse_uneven
from esper.engine.grow import Grow
from esper.engine.judging.judge import RECENT
from esper.randomness import seed_for, seed_global_draws

Pass = Callable[[Any], Tensor]


class GlobalBatch:
    """The micro-batches of one training's steps; ``batch_of(number)`` gives each of them, and ``loss_of(batch)`` its mean loss."""

    def __init__(self, ranks: Ranks, grow: Grow, seed: int, batch_of: Callable[[int], Any], loss_of: Pass) -> None:
        refuse_uneven(ranks.shards, ranks.size)
        self.ranks, self.grow, self.seed, self.batch_of, self.loss_of = ranks, grow, seed, batch_of, loss_of
        self.model = grow.registry.model
        self.mine = ranks.shards // ranks.size
        self.step = 0
        if grow.judge is not None:
            grow.judge.gathered = self._recent

    def gradients(self, step: int, parameters: list[nn.Parameter], backward: Callable[[Tensor], None]) -> Tensor:
        """Leave the gradients of host and branches in their ``grad``, and return the mean loss; all ranks get the same."""
        self.step = step
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        total, losses = OrderedSum(self.mine), []
        for number in self._numbers(step):
            self._begin(number, before)
            batch = self.batch_of(number)
            loss = self.loss_of(batch)
            backward(loss / self.ranks.shards)
            losses.append(loss.detach())
            self.grow.after_backward(batch, losses[-1])
            statistics: list[Tensor | None] = [buffer.clone() for buffer in self._statistics()]
            total.add([*_taken(parameters), *self.grow.agreement.take_gradients(), *statistics])
        seed_global_draws(seed_for(self.seed, "step", step))
        told = self.grow.agreement.losses([float(loss) for loss in losses])
        self._put(parameters, total)
        return torch.tensor(told, device=self.grow.device).mean()

    def loss_again(self, step: int) -> float:
        """The mean loss of a step's micro-batches once more, with the same draws; buffers and draws are the caller's to put back."""
        losses = []
        self.ranks.come_to(f"the passes of a closer look at step {step}")
        for number in self._numbers(step):
            self._begin(number, {})
            losses.append(float(self.loss_of(self.batch_of(number))))
        told = [loss for one in self.ranks.values(f"a closer look at step {step}", losses) for loss in one]
        return float(torch.tensor(told).mean())

    def _numbers(self, step: int) -> range:
        """This rank's micro-batches of a step, as numbers of the run."""
        first = step * self.ranks.shards + self.ranks.rank * self.mine
        return range(first, first + self.mine)

    def _begin(self, number: int, buffers: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers() if buffers else ():
                buffer.copy_(buffers[name])
        seed_global_draws(seed_for(self.seed, "micro-batch", number))

    def _statistics(self) -> list[Tensor]:
        """Buffers that are averaged: counters, which are the same after every micro-batch, are not."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    @torch.no_grad()
    def _put(self, parameters: list[nn.Parameter], total: OrderedSum) -> None:
        """Share the sums with the other ranks, and put gradients and norm statistics in their places."""
        branches, statistics, found = self.grow.agreement.branch_parameters(), self._statistics(), total.result
        if self.ranks.sharded:  # FSDP has averaged the host's over the processes
            averaged, found = found[: len(parameters)], found[len(parameters) :]
            for parameter, gradient in zip(parameters, averaged, strict=True):
                parameter.grad = None if gradient is None else gradient * self.ranks.size
            parameters = []
        learn = [*parameters, *branches]
        sums = self.ranks.sum(found, [*learn, *statistics])
        for parameter, gradient in zip(learn, sums[: len(learn)], strict=True):
            parameter.grad = gradient
        for buffer, summed in zip(statistics, sums[len(learn) :], strict=True):
            assert summed is not None
            buffer.copy_(summed / self.ranks.shards)

    def _recent(self) -> list[Any]:
        """The last micro-batches of the training, for norm statistics: the same on every number of processes."""
        end = (self.step + 1) * self.ranks.shards
        return [self.batch_of(number) for number in range(max(0, end - RECENT), end)]


def _taken(parameters: list[nn.Parameter]) -> list[Tensor | None]:
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken
