"""The torch implementation as registered ops, which a compiled host's graph calls without Triton.

An op is opaque to the compiler, so that on a CPU it may look at values (which seeds are active) without breaking the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esper.kernels import reference, reference_branches


@torch.library.custom_op("esper::reference_telemetry", mutates_args=())
def reference_telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    """``reference.telemetry``: float32 ``[seeds, 4]``."""
    return reference.telemetry(x, seeds, near_zero)


@reference_telemetry.register_fake
def _(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    return x.new_empty(seeds, 4, dtype=torch.float32)


@torch.library.custom_op("esper::reference_branches", mutates_args=())
def branches(x: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``reference_branches.forward`` of ``x [rows, W]``: ``(y, live, power)``."""
    with torch.autocast(x.device.type, enabled=False):
        return reference_branches.forward(x, alpha, route, kinds, parameters)


@branches.register_fake
def _(x: Tensor, alpha: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha)


@torch.library.custom_op("esper::reference_branches_backward", mutates_args=())
def branches_backward(
    x: Tensor, dy: Tensor, live: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """``reference_branches.backward`` without objectives: ``(dx, gradients)``."""
    with torch.autocast(x.device.type, enabled=False):
        dx, gradients, _ = reference_branches.backward(x, dy, live, None, route, kinds, parameters)
    return dx, gradients


@branches_backward.register_fake
def _(x: Tensor, dy: Tensor, live: Tensor, route: Tensor, kinds: str, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x), [torch.empty_like(parameter) for parameter in parameters]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, route, kinds, parameters = inputs
    ctx.kinds = kinds
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, output[1], route, *parameters)


def _differentiate(ctx: Any, dy: Tensor, _live: Tensor, _power: Tensor) -> tuple[Any, ...]:
    x, live, route, *parameters = ctx.saved_tensors
    dx, gradients = branches_backward(x, dy, live, route, ctx.kinds, parameters)
    return dx, None, None, None, gradients


branches.register_autograd(_differentiate, setup_context=_save)
