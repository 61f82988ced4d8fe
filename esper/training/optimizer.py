"""AdamW for branches: every slot has its own moments, step count and warm-up, and a slot that does not learn is not touched.

A stock AdamW would decay frozen rows and move them by old momentum, and adding parameter groups breaks torch's schedulers;
so the host's optimizer never sees a branch, and follows only in the learning rate: the host's present factor times the
slot's own warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints import SlotBank
from esper.seeds import Branch, Garden
from esper.training.rows import BlockRows, Rows, SlotRows
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


PATIENCE = 10
"""Steps in a row for which a branch's gradient may overflow under a loss scale. The scale may still fall, as it does while it
is being found; a branch that overflows longer would never learn at the scale that suits its host."""


class BranchOptimizer:
    """Steps the learning branches of a garden; ``failures`` counts steps refused for a non-finite gradient, by branch.

    Of a gradient that was scaled for half precision, only the last of ``PATIENCE`` such steps in a row is a failure.
    """

    def __init__(self, garden: Garden, learning: BranchLearning) -> None:
        self.garden = garden
        self.learning = learning
        self.failures: dict[int, int] = {}
        self.norms: dict[int, float] = {}
        self.scaled: frozenset[int] = frozenset()

    @torch.no_grad()
    def step(self, branches: list[Branch], factor: float, scaled: frozenset[int] = frozenset()) -> None:
        """One step of the given branches with ``lr · factor · warm-up``; uses and then drops the gradients at hand.

        ``scaled`` are the branches whose gradient came in under a loss scale. ``norms`` then holds the L2 norm of the gradient
        of each branch that had one, before clipping; one that overflowed under the scale has none.
        """
        self.scaled = scaled
        rows: list[Rows] = []
        for (site, blueprint), group in by_bank(branches).items():
            bank = self.garden.layers[site].bank(blueprint)
            rows += [SlotRows(bank, group)] if isinstance(bank, SlotBank) else [BlockRows(bank, branch) for branch in group]
        self.norms = {}
        self._step([row for row in rows if row.gradients], factor)
        self.clear()

    def clear(self) -> None:
        """Drop every gradient of every branch."""
        for layer in self.garden.layers:
            for parameter in layer.parameters():
                parameter.grad = None

    def _step(self, rows: list[Rows], factor: float) -> None:
        """All branches at once: a handful of operations over lists of tensors, and one wait for the device."""
        if not rows:
            return
        squares = [_squares(part) for part in rows]
        unsound = self._note(rows, squares)
        if unsound:
            sound = [part.without(unsound) for part in rows if any(branch.id in unsound for branch in part.branches)]
            rows = [part for part in rows if not any(branch.id in unsound for branch in part.branches)]
            rows += [part for part in sound if part is not None and part.branches]
            squares = [_squares(part) for part in rows]
        if rows:
            self._adamw(rows, torch.cat(squares), torch.cat([part.count() for part in rows]), factor)
            for part in rows:
                part.keep()

    def _adamw(self, rows: list[Rows], squares: Tensor, steps: Tensor, factor: float) -> None:
        """In place; ``squares`` and ``steps`` ``[branches]`` in the order of ``rows``."""
        learning, (beta1, beta2) = self.learning, self.learning.betas
        values, gradients, first, second = ([tensor for part in rows for tensor in kind(part)] for kind in _KINDS)
        rate = learning.lr * factor * (steps / learning.warmup).clamp(max=1.0)

        def each(scalars: Tensor) -> list[Tensor]:
            """A factor a branch, shaped for each of its tensors."""
            parts = zip(rows, scalars.split([len(part.branches) for part in rows]), strict=True)
            return [scalar.view(-1, *([1] * (tensor.dim() - 1))) for part, scalar in parts for tensor in part.values]

        if learning.clip > 0.0:
            gradients = torch._foreach_mul(gradients, each((learning.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)))
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
        below = torch._foreach_div(second, each(1.0 - beta2**steps))
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, learning.eps)
        moved = torch._foreach_mul(first, each(rate / (1.0 - beta1**steps)))
        torch._foreach_div_(moved, below)
        if learning.weight_decay:
            torch._foreach_mul_(values, each(1.0 - rate * learning.weight_decay))
        torch._foreach_sub_(values, moved)

    def _note(self, rows: list[Rows], squares: list[Tensor]) -> set[int]:
        """Note all gradient norms; the branches whose gradient is not finite. Waits for the device once."""
        branches = [branch for part in rows for branch in part.branches]
        unsound = set()
        for branch, norm in zip(branches, torch.cat(squares).sqrt().tolist(), strict=True):
            if math.isfinite(norm):
                self.norms[branch.id], branch.overflows = norm, 0
                continue
            unsound.add(branch.id)
            if branch.id in self.scaled:
                branch.overflows += 1
            else:
                self.norms[branch.id] = norm
            if branch.id not in self.scaled or branch.overflows >= PATIENCE:
                self.failures[branch.id] = self.failures.get(branch.id, 0) + 1
        return unsound


_KINDS: tuple[Callable[[Rows], list[Tensor]], ...] = (
    lambda part: part.values,
    lambda part: part.gradients,
    lambda part: part.first,
    lambda part: part.second,
)


def _squares(part: Rows) -> Tensor:
    """Squared L2 norm of each branch's gradient, float32 ``[A]``."""
    norms = [torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1) for gradient in part.gradients]
    return torch.stack(norms).square().sum(0)
