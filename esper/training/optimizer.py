"""AdamW for branches: every slot has its own moments, step count and warm-up, and a slot that does not learn is not touched.

A stock AdamW would decay frozen rows and move them by old momentum, and adding parameter groups breaks torch's schedulers;
so the host's optimizer never sees a branch, and follows only in the learning rate: the host's present factor times the
slot's own warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints import BlockBank, SlotBank
from esper.seeds import Branch, Garden
from esper.training.signals import by_bank


@dataclass(frozen=True)
class BranchLearning:
    """Settings of AdamW (Loshchilov & Hutter 2019) for branches; ``warmup`` in a branch's own steps, ``clip`` 0 is off."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 1
    clip: float = 0.0


class BranchOptimizer:
    """Steps the learning branches of a garden; ``failures`` counts steps refused for a non-finite gradient, by branch."""

    def __init__(self, garden: Garden, learning: BranchLearning) -> None:
        self.garden = garden
        self.learning = learning
        self.failures: dict[int, int] = {}
        self.norms: dict[int, float] = {}

    @torch.no_grad()
    def step(self, branches: list[Branch], factor: float) -> None:
        """One step of the given branches with ``lr · factor · warm-up``; uses and then drops the gradients at hand.

        ``norms`` then holds the L2 norm of the gradient of each branch that had one, before clipping.
        """
        self.norms = {}
        for (site, blueprint), group in by_bank(branches).items():
            bank = self.garden.layers[site].bank(blueprint)
            if isinstance(bank, SlotBank):
                self._step_slots(bank, group, factor)
            else:
                for branch in group:
                    self._step_block(bank, branch, factor)
        self.clear()

    def clear(self) -> None:
        """Drop every gradient of every branch."""
        for layer in self.garden.layers:
            for parameter in layer.parameters():
                parameter.grad = None

    def _step_slots(self, bank: SlotBank, group: list[Branch], factor: float) -> None:
        slots = torch.tensor([branch.slot for branch in group], device=bank.steps.device)
        held = [(stack, *bank.moments[name]) for name, stack in bank.stacks.items() if stack.grad is not None]
        if not held:
            return
        gradients = [stack.grad.index_select(0, slots).flatten(1) for stack, _, _ in held]  # type: ignore[union-attr]
        squares = torch.stack([gradient.float().square().sum(1) for gradient in gradients]).sum(0)
        if not self._sound(group, squares):
            sound = torch.isfinite(squares)
            slots, squares = slots[sound], squares[sound]
            gradients = [gradient[sound] for gradient in gradients]
        bank.steps[slots] += 1
        # All parameters of a branch side by side, ``[A, size]``: one operation for them all instead of one for each.
        gradient = torch.cat(gradients, 1) * _clip_scale(squares, self.learning.clip).unsqueeze(1)
        kinds = list(zip(*held, strict=True))
        value, first, second = (torch.cat([t.index_select(0, slots).flatten(1) for t in kind], 1) for kind in kinds)
        after = self._adamw(value, gradient, first, second, bank.steps[slots].unsqueeze(1), factor)
        sizes = [gradient.shape[1] for gradient in gradients]
        for kind, rows in zip(kinds, after, strict=True):
            for tensor, row in zip(kind, rows.split(sizes, 1), strict=True):
                tensor.index_copy_(0, slots, row.reshape(-1, *tensor.shape[1:]))

    def _step_block(self, bank: BlockBank, branch: Branch, factor: float) -> None:
        key = str(branch.slot)
        named = [(name, p) for name, p in bank.blocks[key].named_parameters() if p.grad is not None]
        if not named:
            return
        squares = torch.stack([p.grad.float().square().sum() for _, p in named]).sum().reshape(1)  # type: ignore[union-attr]
        if not self._sound([branch], squares):
            return
        scale = _clip_scale(squares, self.learning.clip)
        bank.steps[key] += 1
        steps = torch.tensor(float(bank.steps[key]), device=squares.device)
        for name, parameter in named:
            first, second = bank.moments[key][name]
            assert parameter.grad is not None
            value, m, v = self._adamw(parameter, parameter.grad * scale, first, second, steps, factor)
            parameter.copy_(value)
            first.copy_(m)
            second.copy_(v)

    def _adamw(
        self, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor, factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        learning, (beta1, beta2) = self.learning, self.learning.betas
        rate = learning.lr * factor * (steps / learning.warmup).clamp(max=1.0)
        first = beta1 * first + (1.0 - beta1) * gradient
        second = beta2 * second + (1.0 - beta2) * gradient.square()
        moved = (first / (1.0 - beta1**steps)) / ((second / (1.0 - beta2**steps)).sqrt() + learning.eps)
        return value * (1.0 - rate * learning.weight_decay) - rate * moved, first, second

    def _sound(self, group: list[Branch], squares: Tensor) -> bool:
        """Note the gradient norms of a bank's branches and the failures among them; whether there was none. Waits for the device once."""
        norms = squares.sqrt().tolist()
        for branch, norm in zip(group, norms, strict=True):
            self.norms[branch.id] = norm
            if not math.isfinite(norm):
                self.failures[branch.id] = self.failures.get(branch.id, 0) + 1
        return all(map(math.isfinite, norms))


def _clip_scale(squares: Tensor, clip: float) -> Tensor:
    if clip <= 0.0:
        return torch.ones_like(squares)
    return (clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
