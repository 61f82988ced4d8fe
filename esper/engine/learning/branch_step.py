"""One step of many branches' tensors, by AdamW's rule and by Muon's: in place, all rows at once.

On a GPU launches are its cost, so what many tensors share is one operation over their list, and Muon's matrices of one shape are one batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.engine.learning.branch_rows import BranchLearning
from esper.engine.learning.muon import orthogonalised, rate_scale


class Moved(NamedTuple):
    """One tensor ``[A, …]`` of part ``place`` with its gradient and moments."""

    place: int
    value: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor


@dataclass
class BranchStep:
    """One step of many tensors: ``scale`` (of the gradients; None: 1), ``rate`` and ``steps`` ``[rows]``; ``lengths`` rows a part.

    Rows that are not ``moving`` (bool ``[rows]``; None: all are) have gradients and a rate of zero, and keep their moments.
    """

    learning: BranchLearning
    lengths: list[int]
    scale: Tensor | None
    rate: Tensor
    steps: Tensor
    moving: Tensor | None

    def adamw(self, tensors: list[Moved]) -> None:
        """In place."""
        learning, (beta1, beta2) = self.learning, self.learning.betas
        values, gradients = [one.value for one in tensors], self._clipped(tensors)
        first, second = [one.first for one in tensors], [one.second for one in tensors]
        torch._foreach_mul_(first, self._kept(beta1, tensors))
        torch._foreach_add_(first, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(second, self._kept(beta2, tensors))
        torch._foreach_addcmul_(second, gradients, gradients, 1.0 - beta2)
        below = torch._foreach_div(second, self._each(1.0 - beta2**self.steps, tensors))
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, learning.eps)
        moved = torch._foreach_mul(first, self._each(self.rate / (1.0 - beta1**self.steps), tensors))
        torch._foreach_div_(moved, below)
        if learning.weight_decay:
            torch._foreach_mul_(values, self._each(1.0 - self.rate * learning.weight_decay, tensors))
        torch._foreach_sub_(values, moved)

    def muon(self, tensors: list[Moved]) -> None:
        """In place: momentum as Nesterov's, made orthogonal matrix by matrix, as torch.optim.Muon does; all of one shape at once."""
        factors = zip(tensors, self._clipped(tensors), self._shaped(self.rate, tensors), self._shaped(self._share(), tensors), strict=True)
        alike: dict[Any, list[tuple[Moved, tuple[Tensor, ...]]]] = defaultdict(list)
        for one, *beside in factors:
            alike[(one.value.flatten(2).shape[1:], one.value.dtype)].append((one, tuple(part.flatten(2) for part in beside)))
        for (shape, dtype), several in alike.items():
            moved = [one for one, _ in several]
            gradient, rate, share = (torch.cat(parts) for parts in zip(*(beside for _, beside in several), strict=True))
            first = torch.cat([one.first.flatten(2) for one in moved]).mul_(share).add_(gradient, alpha=1.0 - self.learning.momentum)
            direction = orthogonalised(gradient.lerp(first, self.learning.momentum)).to(dtype)
            value = torch.cat([one.value.flatten(2) for one in moved]).mul_(1.0 - rate * self.learning.weight_decay)
            value.sub_(rate * rate_scale(shape) * direction)
            for tensor, kept in ((first, [one.first for one in moved]), (value, [one.value for one in moved])):
                parts = tensor.split([len(one) for one in kept])
                torch._foreach_copy_(kept, [part.view_as(one) for part, one in zip(parts, kept, strict=True)])

    def _share(self) -> Tensor:
        """The share of the momentum that each row keeps; a row that does not move keeps all of it."""
        kept = torch.full_like(self.rate, self.learning.momentum)
        return kept if self.moving is None else torch.where(self.moving, kept, 1.0)

    def _clipped(self, tensors: list[Moved]) -> list[Tensor]:
        gradients = [one.gradient for one in tensors]
        return gradients if self.scale is None else list(torch._foreach_mul(gradients, self._each(self.scale, tensors)))

    def _kept(self, share: float, tensors: list[Moved]) -> Any:
        """The share of a moment that each row keeps."""
        return [share] * len(tensors) if self.moving is None else self._each(torch.where(self.moving, share, 1.0), tensors)

    def _each(self, scalars: Tensor, tensors: list[Moved]) -> Any:
        """A factor a row for lists of these tensors: one scalar where there is one row, which is one launch."""
        return scalars.view(()) if self.lengths == [1] else self._shaped(scalars, tensors)

    def _shaped(self, scalars: Tensor, tensors: list[Moved]) -> list[Tensor]:
        parts = torch.split(scalars, self.lengths)
        return [shaped(parts[one.place], one.value) for one in tensors]


def shaped(scalars: Tensor, tensor: Tensor) -> Tensor:
    """``[rows]`` for ``tensor [rows, …]``."""
    return scalars.view(-1, *([1] * (tensor.dim() - 1)))
