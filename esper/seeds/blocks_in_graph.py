"""A grown block in a compiled host's graph: it runs compiled as its neighbours do, is blended by α, and is contained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block_call import BlockCall


class GraphBlock:
    """The block that a site's forward adds, for the seed of this number.

    While it is not ``learning``, its parameters keep no gradient. The graph computes one all the same, because a block that stops to
    learn must not compile the host anew.
    """

    def __init__(self, seed: int, block: nn.Module) -> None:
        self.seed = seed
        self.block = block
        self.learning = True
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(self._drop_unless_learning)

    def _drop_unless_learning(self, parameter: Tensor) -> None:
        if not self.learning:
            parameter.grad = None


def add_block(y: Tensor, grown: GraphBlock, alpha: Tensor, call: BlockCall, due: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``y + α·(B(y) − y)``, the block called as the host called its own.

    Args:
        y: the site's output, in the host's own layout.
        alpha: float32 ``[S]``, of all the site's seeds.
        due: whether telemetry is.

    Returns:
        The sum; ``live`` ``[S]``, α where the block took part, 0 where it is not finite, and of other seeds; and Σδ² ``[S]``, 0
        where telemetry is not due.
    """
    read = FiniteGradient.apply(y)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    delta = call.answer(grown.block, read) - read
    mine = torch.zeros_like(alpha)
    mine[grown.seed] = 1.0
    finite = torch.isfinite(delta.detach()).all()
    delta = torch.where(finite, delta, torch.zeros((), dtype=delta.dtype, device=delta.device))
    y = y + (delta * alpha[grown.seed].to(delta.dtype)).to(y.dtype)
    squares = mine * delta.detach().float().square().sum() if due else mine * 0.0
    return y, alpha * mine * finite, squares


class FiniteGradient(torch.autograd.Function):
    """``y`` itself. A gradient that is not finite everywhere is not passed on, so that a block cannot spoil the host's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """A view."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient or zeros."""
        (gradient,) = gradients
        return torch.where(torch.isfinite(gradient).all(), gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))
