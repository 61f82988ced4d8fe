"""The branches op for the graph of a compiled host: it changes the site's activation itself, and keeps the chunks that it changes.

The compiler lets the operation that makes an activation, or the gradient that arrives, write where the branches work. A functional op
would copy both, which costs a pass over the site in each direction. The backward pass needs the active chunks only: ``kept``, one tensor
``[capacity, rows, chunk]`` a bank, instead of the site's whole input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from esper.kernels.branch_kinds import split_banks
from esper.kernels.branches import bank_backward, bank_forward, contain, sum_gradients
from esper.kernels.chunk_layout import chunk_width
from esper.kernels.telemetry import ActiveList, PartialSums, fill_active_list


@custom_op("esper::branches_in_place", mutates_args=("y", "kept", "live", "power"))
def branches_in_place(
    y: Tensor, kept: list[Tensor], live: Tensor, power: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]
) -> None:
    """The active chunks of ``y [outer, inner, W]`` become ``y + α·δ(y)``; the others are filled: see ``esper.kernels.dispatch``."""
    seeds, banks = alpha.shape[0], split_banks(kinds, parameters)
    partial, active = PartialSums.empty(y, seeds, False, copies=True), ActiveList.empty(alpha, None, route, len(banks))
    fill_active_list(active, seeds)
    for number, (name, tensors) in enumerate(banks):
        sums, launch = bank_forward(y, y, kept[number], partial, active, number, name, tensors, 0.0)
        contain(y, y, kept[number], active, sums, partial, live, power, power, number, launch, False)


def room_for_chunks(y: Tensor, seeds: int, kinds: str, parameters: list[Tensor]) -> list[Tensor]:
    """``kept`` for a site's ``y [outer, inner, W]``, not filled."""
    rows, chunk = y.shape[0] * y.shape[1], chunk_width(y.shape[2], seeds)
    return [y.new_empty(tensors[0].shape[0], rows, chunk) for _, tensors in split_banks(kinds, parameters)]


@custom_op("esper::branches_in_place_backward", mutates_args=("dx", "gradients"))
def branches_in_place_backward(
    dx: Tensor, kept: list[Tensor], live: Tensor, route: Tensor, kinds: str, parameters: list[Tensor], gradients: list[Tensor]
) -> None:
    """``dx`` holds the gradient of the output at first, and only its active chunks change; ``gradients`` are filled."""
    seeds, banks = live.shape[0], split_banks(kinds, parameters)
    active = ActiveList.empty(live, None, route, len(banks))
    fill_active_list(active, seeds)
    left = iter(gradients)
    for number, (name, tensors) in enumerate(banks):
        found, launch = bank_backward(dx, dx, dx, live, None, route, active.seeds[number], name, tensors, kept[number])
        sum_gradients(found[:-1], [next(left) for _ in tensors], active, dx, number, launch)


class BranchesInPlace(torch.autograd.Function):
    """``(y, live, power)`` of both ops, for a compiler to trace."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, route: Tensor, kinds: str, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [outer, inner, W]``; the compiler leaves out the copy where nothing else reads ``x``."""
        y, live, power = x.clone(), torch.empty_like(alpha), torch.empty_like(alpha)
        kept = room_for_chunks(y, alpha.shape[0], kinds, list(parameters))
        branches_in_place(y, kept, live, power, alpha, route, kinds, list(parameters))
        ctx.kinds, ctx.banks = kinds, len(kept)
        ctx.mark_non_differentiable(live, power)
        ctx.save_for_backward(live, route, *kept, *parameters)
        return y, live, power

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """The gradients of ``x`` and the parameters."""
        live, route, *rest = ctx.saved_tensors
        kept, parameters = list(rest[: ctx.banks]), list(rest[ctx.banks :])
        dx, gradients = arriving[0].clone(), [torch.empty_like(tensor) for tensor in parameters]
        branches_in_place_backward(dx, kept, live, route, ctx.kinds, parameters, gradients)
        return dx, None, None, None, *gradients
