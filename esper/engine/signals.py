"""Signals of the run's course: the averages and steadiness of the training loss, and the gradient norms of branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.blueprints import SlotBank
from esper.seeds import Branch, SeedRegistry
from esper.seeds.device_copy import tensor_on


class LossSignal:
    """Fast (0.9) and slow (0.98) exponential averages of the training loss, and its variance around the fast one."""

    def __init__(self) -> None:
        self.fast = self.slow = float("nan")
        self.variance = 0.0
        self.heard = False
        self.diverging = False
        """Whether the last loss was no finite number: the host is not well, and nothing may grow on it."""

    def update(self, loss: float) -> None:
        """Take in one tick's loss; a non-finite one spoils the averages until finite ones replace it."""
        self.heard = True
        self.diverging = not math.isfinite(loss)
        if not math.isfinite(self.fast):
            self.fast, self.slow, self.variance = loss, loss, 0.0
            return
        deviation = loss - self.fast
        self.variance = 0.9 * (self.variance + 0.1 * deviation * deviation)
        self.fast = 0.9 * self.fast + 0.1 * loss
        self.slow = 0.98 * self.slow + 0.02 * loss

    def noise(self) -> float:
        """Standard deviation of the difference of two fast averages of a loss that stands still: ``√(2·v·0.1/1.9)``."""
        return math.sqrt(2.0 * self.variance * 0.1 / 1.9)

    def steadiness(self) -> float:
        """``1 − max(0, fast − slow) / |slow|``, cut at 0: 1 is a loss that stands still or falls, NaN one never seen.

        Only a rise counts against it: a host that is still learning has not been unsettled.
        """
        if not (math.isfinite(self.fast) and math.isfinite(self.slow)) or self.slow == 0.0:
            return float("nan")
        return max(0.0, 1.0 - max(0.0, self.fast - self.slow) / abs(self.slow))

    def state(self) -> dict[str, float]:
        """Everything, for a checkpoint."""
        return {"fast": self.fast, "slow": self.slow, "variance": self.variance, "diverging": float(self.diverging)}

    def load(self, state: dict[str, float]) -> None:
        """Take over a saved state."""
        self.fast, self.slow, self.variance = state["fast"], state["slow"], state["variance"]
        self.diverging = bool(state.get("diverging", 0.0))
        self.heard = math.isfinite(self.fast) or self.diverging


def branch_values(registry: SeedRegistry, branch: Branch) -> list[Tensor]:
    """The branch's parameters, detached copies."""
    bank = registry.layers[branch.site].bank(branch.blueprint)
    if isinstance(bank, SlotBank):
        return list(bank.values(branch.slot).values())
    return [value.detach().clone() for value in bank.blocks[str(branch.slot)].parameters()]


def gradient_norms(registry: SeedRegistry, branches: list[Branch]) -> tuple[list[list[int]], list[int], list[Tensor]]:
    """By bank: the branches that have a gradient, the number of their parameters each, and the gradient's L2 norms ``[branches]``."""
    names: list[list[int]] = []
    counts: list[int] = []
    norms: list[Tensor] = []
    for (site, blueprint), group in by_bank(branches).items():
        bank = registry.layers[site].bank(blueprint)
        if isinstance(bank, SlotBank):
            gradients = [stack.grad for stack in bank.stacks.values() if stack.grad is not None]
            if gradients:
                slots = tensor_on([branch.slot for branch in group], bank.steps.device)
                squares = torch.stack([gradient[slots].float().flatten(1).square().sum(1) for gradient in gradients]).sum(0)
                names.append([branch.id for branch in group])
                counts.append(sum(gradient[0].numel() for gradient in gradients))
                norms.append(squares.sqrt())
            continue
        for branch in group:
            gradients = [p.grad for p in bank.blocks[str(branch.slot)].parameters() if p.grad is not None]
            if gradients:
                names.append([branch.id])
                counts.append(sum(gradient.numel() for gradient in gradients))
                norms.append(torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt().view(1))
    return names, counts, norms


def by_bank(branches: list[Branch]) -> dict[tuple[int, str], list[Branch]]:
    """The branches of each (site, blueprint), whose parameters lie in one bank."""
    gathered: dict[tuple[int, str], list[Branch]] = {}
    for branch in branches:
        gathered.setdefault((branch.site, branch.blueprint), []).append(branch)
    return gathered
