"""Layer-receptive branches in a compiled host's graph: they read the site's whole activation, and write to their seed's chunk.

All slots of a bank are computed, those without a branch as well, so that no shape depends on which seeds are active. Forward and backward
are spelled out in torch operations, which the compiler fuses; the products take the branches of all slots at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.kernels.branch_kinds import KINDS, BankTensors, BranchKind, bank_tensors
from esper.kernels.reference_branches import ActiveBranches, Chunks, chosen_tensors, hidden_units, subtracted


def _side_by_side(weights: Tensor) -> Tensor:
    """``[cap, W, H] → [W, cap·H]``."""
    return weights.transpose(0, 1).flatten(1)


def _pre_activations(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """``[cap, rows, H]`` of ``x [rows, W]``, in one product."""
    capacity, _, hidden = weights.shape
    value = (x @ _side_by_side(weights)).view(x.shape[0], capacity, hidden).transpose(0, 1)
    return value if bias is None else value + bias[:, None]


def _both_sides(x: Tensor, p: BankTensors, kind: BranchKind) -> tuple[Tensor, Tensor]:
    value = _pre_activations(x, p.w1, p.b1 if kind.bias else None)
    return value, _pre_activations(x, p.wg, p.bg) if kind.gated else value


class LayerBranches(torch.autograd.Function):
    """What the branches of one bank add to a site, for a compiler to trace.

    A branch is contained as everywhere: if Σδ² of the call or α is not finite, it adds nothing, and no gradient comes back from it. A
    branch whose own backward pass is not finite sends nothing to the host either.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, route: Tensor, number: int, name: str, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(added [rows, W], live [S], power [S])`` for ``x [rows, W]``; ``alpha``, ``route`` as the branches op takes them.

        ``live`` and ``power`` are 0 for the seeds of other banks than ``number``.
        """
        bank, kind, seeds = bank_tensors(name, list(parameters)), KINDS[name], alpha.shape[0]
        site = Chunks.of(x, seeds)
        active = ActiveBranches.of((route[:, 0] == number) & (alpha != 0), route, bank.capacity)
        p = chosen_tensors(bank, active, x.dtype)
        delta = hidden_units(*_both_sides(x, p, kind), kind)[0] @ p.w2
        delta = delta + p.b2[:, None] if kind.bias else delta
        chunks = site.gather(x, active)
        delta = delta - subtracted(route, active, x.dtype)[:, None, None] * chunks
        delta = delta.masked_fill(~site.mask[active.seeds][:, None], 0)
        strength = alpha[active.seeds]
        squares = delta.float().square()
        if x.dtype == torch.float16:
            squares = squares.masked_fill((chunks + strength.to(x.dtype)[:, None, None] * delta).isinf(), torch.inf)
        squares = active.only_real(squares.sum((1, 2)))
        fine = squares.isfinite() & strength.isfinite()
        added = torch.where(fine[:, None, None], strength.to(x.dtype)[:, None, None] * delta, 0)
        live = active.by_seed(torch.where(fine, strength, 0), alpha)
        power = active.by_seed(squares, alpha)
        ctx.number, ctx.name = number, name
        ctx.mark_non_differentiable(live, power)
        ctx.save_for_backward(x, live, route, *parameters)
        return site.scatter(active.only_real(added), active), live, power

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        """The gradients of ``x`` and of the bank's stacks; slots that do not learn have zeros."""
        x, live, route, *parameters = ctx.saved_tensors
        bank, kind, dy = bank_tensors(ctx.name, list(parameters)), KINDS[ctx.name], arriving[0]
        site = Chunks.of(x, live.shape[0])
        active = ActiveBranches.of((route[:, 0] == ctx.number) & (live != 0), route, bank.capacity)
        p = chosen_tensors(bank, active, x.dtype)
        g = active.only_real(live[active.seeds].to(x.dtype)[:, None, None] * site.gather(dy, active))
        hidden, slope, switch_slope = hidden_units(*_both_sides(x, p, kind), kind)
        back = g @ p.w2.mT
        sides = [back * slope] + ([back * switch_slope] if kind.gated else [])
        sound = torch.stack([side.isfinite().flatten(1).all(1) for side in sides]).all(0)[:, None, None]
        dx = site.scatter(-subtracted(route, active, x.dtype)[:, None, None] * g, active)
        inward: list[Tensor] = []
        for side, weights in zip(sides, (p.w1, p.wg), strict=False):
            flat = side.transpose(0, 1).flatten(1)
            inward.append((x.mT @ flat).view(x.shape[1], *side.shape[::2]).transpose(0, 1))
            dx = dx + torch.where(sound, side, 0).transpose(0, 1).flatten(1) @ _side_by_side(weights).mT
        found = [inward[0], sides[0].sum(1), hidden.mT @ g, g.sum(1)] if kind.bias else [inward[0], hidden.mT @ g]
        if kind.gated:
            found += [inward[1], sides[1].sum(1)]
        learns = active.only_real((route[active.seeds, 2] & 2) == 0)
        gradients = []
        for tensor, gradient in zip(parameters, found, strict=True):
            gradient = torch.where(learns.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0)
            gradient = gradient.to(tensor.dtype)
            every = active.real is not None  # an entry for every slot
            gradients.append(gradient if every else torch.zeros_like(tensor).index_copy(0, active.slots, gradient))
        return dx, None, None, None, None, *gradients
