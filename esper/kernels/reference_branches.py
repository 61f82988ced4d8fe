"""Branches on their chunks in plain torch, forward and backward spelled out: the CPU's path and the kernels' yardstick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.kernels.branch_kinds import KINDS, BankTensors, BranchKind, bank_tensors, split_banks
from esper.kernels.chunk_layout import chunk_bounds, feature_owner, padded_index


@dataclass(frozen=True)
class ActiveBranches:
    """The branches of one bank that take part: their seeds, slots ``[k]``, and which entries are real (None: all)."""

    seeds: Tensor
    slots: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, mine: Tensor, route: Tensor, capacity: int) -> ActiveBranches:
        """On a CPU exactly the seeds in ``mine`` (bool ``[S]``); elsewhere, with no wait for the device, one entry a slot."""
        if mine.device.type == "cpu" and not torch.compiler.is_compiling():
            seeds = mine.nonzero()[:, 0]
            return cls(seeds, route[seeds, 1].long(), None)
        slot = torch.where(mine, route[:, 1].long(), capacity)
        owner = torch.zeros(capacity + 1, dtype=torch.int64, device=mine.device)
        owner = owner.scatter(0, slot, torch.arange(mine.shape[0], device=mine.device))[:capacity]
        real = torch.zeros(capacity + 1, dtype=torch.bool, device=mine.device).scatter(0, slot, torch.ones_like(mine))[:capacity]
        return cls(owner, torch.arange(capacity, device=mine.device), real)

    def only_real(self, values: Tensor) -> Tensor:
        """Zero the entries ``values[k, …]`` that stand for no branch."""
        return values if self.real is None else values.masked_fill(~self.real.view(-1, *[1] * (values.dim() - 1)), 0)

    def by_seed(self, values: Tensor, like: Tensor) -> Tensor:
        """float32 ``[S]``, as many as ``like`` has, of values ``[k]``; 0 for all other seeds."""
        seats = like.shape[0]
        seat = self.seeds if self.real is None else torch.where(self.real, self.seeds, seats)
        return torch.zeros(seats + 1, device=like.device).scatter(0, seat, values.float())[:seats]


@dataclass(frozen=True)
class Chunks:
    """Shape of a site: width, seeds, and the padded chunks' features and mask ``[S, C]``."""

    width: int
    seeds: int
    index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, x: Tensor, seeds: int) -> Chunks:
        """For activations ``x [rows, W]``."""
        return cls(x.shape[1], seeds, *padded_index(x.shape[1], seeds, x.device))

    def gather(self, x: Tensor, active: ActiveBranches) -> Tensor:
        """Chunks of the chosen seeds, ``[k, rows, C]``, padded places zero."""
        index, mask = self.index[active.seeds], self.mask[active.seeds]
        return x.index_select(1, index.flatten()).view(x.shape[0], *index.shape).transpose(0, 1).masked_fill(~mask[:, None], 0)

    def scatter(self, values: Tensor, active: ActiveBranches) -> Tensor:
        """The inverse of :meth:`gather`: ``[k, rows, C] -> [rows, W]``, zero elsewhere. A gather, so that GPUs repeat their bits."""
        count, rows, place = values.shape
        if count == 0:
            return values.new_zeros(rows, self.width)
        seat = active.seeds if active.real is None else torch.where(active.real, active.seeds, self.seeds)
        rank = torch.full((self.seeds + 1,), count, device=values.device).scatter(0, seat, torch.arange(count, device=values.device))
        owner = feature_owner(self.width, self.seeds, values.device)
        within = torch.arange(self.width, device=values.device) - chunk_bounds(self.width, self.seeds, values.device)[owner]
        rank = rank[owner]
        place_of = torch.where(rank < count, rank * place + within, count * place)
        flat = torch.cat([values.transpose(0, 1).reshape(rows, count * place), values.new_zeros(rows, 1)], 1)
        return flat.index_select(1, place_of)


def _derivative(h: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "relu":
        return torch.where(h < 0, 0.0, h), (h > 0).to(h.dtype)
    if activation == "gelu":
        below = 0.5 * (1 + torch.erf(h * math.sqrt(0.5)))
        return h * below, below + h * torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    if activation == "silu":
        gate = torch.sigmoid(h)
        return h * gate, gate * (1 + h * (1 - gate))
    return h, torch.ones_like(h)


def chosen_tensors(bank: BankTensors, active: ActiveBranches, dtype: torch.dtype) -> BankTensors:
    """The slots of these branches."""
    names = ("w1", "b1", "w2", "b2", "wg", "bg")
    return BankTensors(**{name: getattr(bank, name).index_select(0, active.slots).to(dtype) for name in names})


def hidden_units(value: Tensor, switch: Tensor, kind: BranchKind) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden units, and their derivatives by both pre-activations; ``switch`` is used by gated kinds alone."""
    if kind.gated:
        gate = torch.sigmoid(switch)
        return gate * value, gate, value * gate * (1 - gate)
    a, slope = _derivative(value, kind.activation)
    return a, slope, slope


def _hidden(c: Tensor, p: BankTensors, kind: BranchKind) -> tuple[Tensor, Tensor, Tensor]:
    """The same of chunks ``c [k, rows, C]``."""
    h = c @ p.w1 + p.b1[:, None] if kind.bias else c @ p.w1
    return hidden_units(h, c @ p.wg + p.bg[:, None] if kind.gated else h, kind)


def delta(c: Tensor, p: BankTensors, kind: BranchKind, subtract: Tensor) -> Tensor:
    """δ of chunks ``c [k, rows, C]``; ``subtract [k]`` is 1 where the input is subtracted."""
    if kind.affine:
        out = c * p.w1[:, None] + p.b2[:, None]
    else:
        out = _hidden(c, p, kind)[0] @ p.w2
        out = out + p.b2[:, None] if kind.bias else out
    return out - subtract[:, None, None] * c


def subtracted(route: Tensor, active: ActiveBranches, dtype: torch.dtype) -> Tensor:
    """``[k]``: 1 for a branch with δ = net(x) − x, else 0."""
    return (route[active.seeds, 2] & 1).to(dtype)


def forward(x: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``y = x + α·δ(x)`` where a branch is routed and α ≠ 0: ``(y [rows, W], live [S], power [S])``.

    Containment: where ``Σδ²`` over the call (float32; float16 adds: a result beyond 65504) or α is not finite, the branch adds
    nothing and ``live`` is 0; elsewhere ``live`` is α. ``power`` is ``Σδ²``. ``route[s] = (bank, slot, bits)``, bit 0: subtract the
    input, bit 1: the branch's parameters do not learn.
    """
    site, seeds = Chunks.of(x, alpha.shape[0]), alpha.shape[0]
    live = torch.where(route[:, 0] >= 0, alpha, 0)
    power = torch.zeros_like(alpha)
    y = x
    for number, (name, tensors) in enumerate(split_banks(kinds, parameters)):
        bank = bank_tensors(name, tensors)
        active = ActiveBranches.of((route[:, 0] == number) & (alpha != 0), route, bank.capacity)
        chunks = site.gather(x, active)
        out = delta(chunks, chosen_tensors(bank, active, x.dtype), KINDS[name], subtracted(route, active, x.dtype))
        out = out.masked_fill(~site.mask[active.seeds][:, None], 0)
        strength = alpha[active.seeds].to(x.dtype)
        squares = out.square() if x.dtype == torch.float64 else out.float().square()
        if x.dtype == torch.float16:
            squares = squares.masked_fill((chunks + strength[:, None, None] * out).isinf(), torch.inf)
        squares = active.only_real(squares.sum((1, 2)))
        fine = squares.isfinite() & strength.isfinite()
        added = torch.where(fine[:, None, None], strength[:, None, None] * out, 0)
        y = y + site.scatter(active.only_real(added), active)
        seat = active.seeds if active.real is None else torch.where(active.real, active.seeds, seeds)
        power = torch.cat([power, power[:1]]).scatter(0, seat, squares.to(power.dtype))[:seeds]
        live = torch.cat([live, live[:1]]).scatter(0, seat, torch.where(fine, alpha[active.seeds], 0))[:seeds]
    return (y.clone() if y is x else y), live, power


def backward(
    x: Tensor, dy: Tensor, live: Tensor, objective: Tensor | None, route: Tensor, kinds: str, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``(dx [rows, W], a gradient for each parameter, residual [S])`` for ``live`` as :func:`forward` returned it.

    An objective ``[S, 2]`` of ``(scale, weight)`` with weight ≠ 0 makes the seed learn ``weight·½‖δ + scale·dy‖²`` in isolation (scale
    = η·B: functional gradient; scale = 0: reconstruction); then ``dx = dy`` on its chunk, ``residual`` is the squared norm.
    """
    site = Chunks.of(x, live.shape[0])
    has_objective = torch.zeros_like(live, dtype=torch.bool) if objective is None else objective[:, 1] != 0
    dx, grads, residual = dy, [], torch.zeros_like(live)
    for number, (name, tensors) in enumerate(split_banks(kinds, parameters)):
        bank, kind = bank_tensors(name, tensors), KINDS[name]
        active = ActiveBranches.of((route[:, 0] == number) & ((live != 0) | has_objective), route, bank.capacity)
        c, arriving, p = site.gather(x, active), site.gather(dy, active), chosen_tensors(bank, active, x.dtype)
        subtract, isolated = subtracted(route, active, x.dtype)[:, None, None], has_objective[active.seeds][:, None, None]
        g = live[active.seeds].to(x.dtype)[:, None, None] * arriving
        if objective is not None:
            scale, weight = objective[active.seeds].to(x.dtype)[:, :, None, None].unbind(1)
            missed = delta(c, p, kind, subtract[:, 0, 0]) + scale * arriving
            missed = torch.where(isolated & site.mask[active.seeds][:, None], missed, 0)
            g = torch.where(isolated, weight * missed, g)
            seat = active.seeds if active.real is None else torch.where(active.real, active.seeds, site.seeds)
            sums = active.only_real(missed.square().sum((1, 2))).to(residual.dtype)
            residual = torch.cat([residual, residual[:1]]).scatter(0, seat, sums)[: site.seeds]
        found, d_chunk = _gradients(c, g, p, kind)
        d_chunk = torch.where(isolated, 0, d_chunk - subtract * g)
        dx = dx + site.scatter(active.only_real(d_chunk), active)
        frozen = (route[active.seeds, 2] & 2) != 0
        for tensor, gradient in zip(tensors, found, strict=True):
            gradient = gradient.masked_fill(frozen.view(-1, *[1] * (gradient.dim() - 1)), 0)
            whole = torch.zeros_like(tensor)
            grads.append(whole.index_copy(0, active.slots, active.only_real(gradient).to(tensor.dtype)))
    return (dx.clone() if dx is dy else dx), grads, residual


def _gradients(c: Tensor, g: Tensor, p: BankTensors, kind: BranchKind) -> tuple[list[Tensor], Tensor]:
    """Gradients of a bank's stacks in their order, and of the chunk, given ``g``, the gradient of δ."""
    if kind.affine:
        return [(g * c).sum(1), g.sum(1)], g * p.w1[:, None]
    hidden, slope, gate_slope = _hidden(c, p, kind)
    back = g @ p.w2.mT
    d_value = back * slope
    d_chunk = d_value @ p.w1.mT
    if not kind.bias:
        return [c.mT @ d_value, hidden.mT @ g], d_chunk
    found = [c.mT @ d_value, d_value.sum(1), hidden.mT @ g, g.sum(1)]
    if kind.gated:
        d_switch = back * gate_slope
        found += [c.mT @ d_switch, d_switch.sum(1)]
        d_chunk = d_chunk + d_switch @ p.wg.mT
    return found, d_chunk


class ReferenceBranches(torch.autograd.Function):
    """:func:`forward` and :func:`backward` as one differentiable step; α, routes and objectives carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, route: Tensor, objective: Tensor | None, kinds: str, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(y, live, power)``."""
        y, live, power = forward(x, alpha, route, kinds, list(parameters))
        ctx.save_for_backward(x, live, route, objective, *parameters)
        ctx.kinds = kinds
        ctx.mark_non_differentiable(live, power)
        return y, live, power

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _live: Tensor, _power: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and the parameters."""
        x, live, route, objective, *parameters = ctx.saved_tensors
        dx, grads, _ = backward(x, dy, live, objective, route, ctx.kinds, parameters)
        return dx, None, None, None, None, *grads
