"""Reading and writing the features of chunks: one copy of the site's activation forward, and one of its gradient backward.

Plain indexing would fill a site of zeros for every group's gradient and add it to the host's; here all groups of a site
share one node of the graph that receives every gradient at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.blueprints.unique_indices import unique_indices
from esper.seeds.branch_groups import Group


def read_chunks(x: Tensor, group: Group, dim: int, seeds: int) -> Tensor:
    """The group's chunks of ``x``: its axis ``dim`` (``[W]``) becomes ``[A, C]``; padding is zero."""
    if group.seeds is not None:
        chunks: Tensor = x.unflatten(dim, (seeds, -1))
        return chunks.index_select(dim, group.seeds)
    chosen: Tensor = x.index_select(dim, group.index).unflatten(dim, (group.alpha.numel(), -1))
    if group.mask is None:
        return chosen
    mask = group.mask.view(*group.mask.shape, *([1] * (x.dim() - dim - 1)))
    return torch.where(mask, chosen, torch.zeros((), dtype=x.dtype, device=x.device))


def add_to_chunks_(y: Tensor, added: Tensor, group: Group, dim: int, seeds: int) -> None:
    """Add ``[…, A, C, …]`` to the group's chunks of ``y``, in place; padding is left out."""
    with unique_indices(y.device):
        if group.seeds is None:
            flat = added.flatten(dim, dim + 1)
            y.index_add_(dim, group.target, flat if group.real is None else flat.index_select(dim, group.real))
        else:
            y.unflatten(dim, (seeds, -1)).index_add_(dim, group.seeds, added)


class ReadChunks(torch.autograd.Function):
    """``x`` itself and every group's chunks; backward adds the chunks' gradients to one copy of the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[Group], dim: int, seeds: int) -> tuple[Tensor, ...]:
        """``(x, chunks of the first group, …)``."""
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.dim, ctx.seeds, ctx.like = groups, dim, seeds, (x.shape, x.dtype, x.device)
        return x.view_as(x), *(read_chunks(x, group, dim, seeds) for group in groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """One gradient a returned tensor, or None."""
        through, *back = gradients
        if all(gradient is None for gradient in back):
            return through, None, None, None
        shape, dtype, device = ctx.like
        whole = torch.zeros(shape, dtype=dtype, device=device) if through is None else through.clone()
        for group, gradient in zip(ctx.groups, back, strict=True):
            if gradient is not None:
                add_to_chunks_(whole, gradient, group, ctx.dim, ctx.seeds)
        return whole, None, None, None


class AddToChunks(torch.autograd.Function):
    """A copy of ``x`` with something added to every group's chunks; backward passes on the one gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[Group], dim: int, seeds: int, *added: Tensor) -> Tensor:
        """Same shape, dtype and memory format as ``x``."""
        ctx.groups, ctx.dim, ctx.seeds = groups, dim, seeds
        y = x.clone()
        for group, addition in zip(groups, added, strict=True):
            add_to_chunks_(y, addition, group, dim, seeds)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient itself for ``x``, its chunks for the additions."""
        (gradient,) = gradients
        wanted = ctx.needs_input_grad[4:]
        parts = (read_chunks(gradient, group, ctx.dim, ctx.seeds) if want else None for group, want in zip(ctx.groups, wanted, strict=True))
        return gradient, None, None, None, *parts
