"""Branches that a compiler traces through their blueprint's own function: convolutions, and all for which there is no kernel.

All slots of a bank are computed, those without a branch as well, so that no shape depends on which seeds are active. What is taken from
the site and put back is spelled out, forward and backward, so that gradients are added up by gathering: GPUs repeat their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.blueprints.base import Blueprint
from esper.kernels.reference_branches import ActiveBranches, Chunks, subtracted


@dataclass(frozen=True, eq=False)
class TracedBank:
    """A bank in the graph: its blueprint, and its stacks ``[capacity, …]`` by name."""

    blueprint: Blueprint
    stacks: dict[str, Tensor]


def traced_branches(x: Tensor, alpha: Tensor, route: Tensor, number: int, bank: TracedBank) -> tuple[Tensor, Tensor, Tensor]:
    """What the branches of one bank add to a site, for a compiler to trace.

    A branch whose δ or α is not finite adds nothing, and no gradient comes back from it. A branch whose own backward pass is not finite
    sends nothing to the host either.

    Args:
        x: ``[…, W]``, features last; ``[batch, …, W]`` if the blueprint sees positions.
        alpha: float32 ``[S]``.
        route: int32 ``[S, 3]``, as the branches op takes it.
        number: which bank of the route this is.

    Returns:
        ``added`` shaped as ``x``; and ``live`` and ``power`` ``[S]``, 0 for the seeds of other banks.
    """
    rows, seeds, capacity = x.reshape(-1, x.shape[-1]), alpha.shape[0], next(iter(bank.stacks.values())).shape[0]
    site = Chunks.of(rows, seeds)
    active = ActiveBranches.of((route[:, 0] == number) & (alpha != 0), route, capacity)
    assert active.real is not None, "a compiler is at work"
    chunks: Tensor = GatherChunks.apply(rows, active.seeds, active.real, seeds)  # type: ignore[no-untyped-call]
    delta = _net(x, chunks, active, bank, (route[active.seeds, 2] & 2) == 0)
    delta = delta - subtracted(route, active, x.dtype)[:, None, None] * chunks
    delta = delta.masked_fill(~site.mask[active.seeds][:, None], 0)
    squares = active.only_real(delta.detach().float().square().sum((1, 2)))
    strength = active.only_real(alpha[active.seeds])
    fine = squares.isfinite() & strength.isfinite()
    strength = torch.where(fine, strength, 0)
    added = torch.where(fine[:, None, None], strength.to(x.dtype)[:, None, None] * delta, 0)
    scattered: Tensor = ScatterChunks.apply(added, active.seeds, active.real, rows.shape[1], seeds)  # type: ignore[no-untyped-call]
    return scattered.view(x.shape), active.by_seed(strength, alpha), active.by_seed(squares, alpha)


def _net(x: Tensor, chunks: Tensor, active: ActiveBranches, bank: TracedBank, learning: Tensor) -> Tensor:
    """``net(x)`` of every slot, ``[capacity, rows, C]``; no gradient reaches the slots that do not learn."""
    blueprint, count = bank.blueprint, chunks.shape[0]
    parameters = {}
    for name, stack in bank.stacks.items():
        learns = active.only_real(learning).view(-1, *[1] * (stack.dim() - 1))
        parameters[name] = torch.where(learns, stack, stack.detach()).to(x.dtype)
    reads = chunks if blueprint.receptive_field == "chunk" else x.reshape(1, -1, x.shape[-1])
    reads = FiniteGradients.apply(reads, count)  # type: ignore[no-untyped-call]
    if not blueprint.spatial:
        return blueprint.forward(parameters, reads)
    places = x.shape[:-1]
    delta = blueprint.forward(parameters, reads.view(count, *places, -1).movedim(-1, 2).transpose(0, 1))
    return delta.transpose(0, 1).movedim(2, -1).reshape(count, chunks.shape[1], -1)


def _these(seeds: Tensor, real: Tensor) -> ActiveBranches:
    return ActiveBranches(seeds, torch.arange(seeds.shape[0], device=seeds.device), real)


class GatherChunks(torch.autograd.Function):
    """``x [rows, W]`` → the chunks ``[k, rows, C]`` of these seeds, padded places zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, real: Tensor, count: int) -> Tensor:
        """``seeds`` int64 and ``real`` bool ``[k]``, for each entry its seed and whether it stands for a branch."""
        ctx.save_for_backward(seeds, real)
        ctx.width, ctx.count = x.shape[1], count
        return Chunks.of(x, count).gather(x, _these(seeds, real))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Every chunk's gradient in its place, and zeros elsewhere."""
        seeds, real = ctx.saved_tensors
        return _put_back(gradients[0], seeds, real, ctx.width, ctx.count), None, None, None


class ScatterChunks(torch.autograd.Function):
    """``[k, rows, C]`` → ``[rows, W]``, zero where no branch writes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, seeds: Tensor, real: Tensor, width: int, count: int) -> Tensor:
        """Of a site with ``width`` features and ``count`` seeds; ``seeds`` and ``real`` as above."""
        ctx.save_for_backward(seeds, real)
        ctx.count = count
        return _put_back(values, seeds, real, width, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient's chunks."""
        seeds, real = ctx.saved_tensors
        these = _these(seeds, real)
        return these.only_real(Chunks.of(gradients[0], ctx.count).gather(gradients[0], these)), None, None, None, None


def _put_back(values: Tensor, seeds: Tensor, real: Tensor, width: int, count: int) -> Tensor:
    these, rows = _these(seeds, real), values.shape[1]
    return Chunks.of(values.new_empty(rows, width), count).scatter(these.only_real(values), these)


class FiniteGradients(torch.autograd.Function):
    """``[1 or k, …]`` → ``[k, …]``, what each branch reads. One whose gradient is not finite sends none back, and spoils no other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        """A view."""
        ctx.shared = x.shape[0] != count
        return x.expand(count, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over branches, if all read the same."""
        (gradient,) = gradients
        finite = gradient.isfinite().flatten(1).all(1).view(-1, *[1] * (gradient.dim() - 1))
        gradient = torch.where(finite, gradient, 0)
        return (gradient.sum(0, keepdim=True) if ctx.shared else gradient), None
