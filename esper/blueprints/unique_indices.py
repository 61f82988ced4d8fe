"""Sums into places that are all different.

No order of adding is left open there, so the direct way gives the same bits in every run. torch does not know that: where
deterministic algorithms are asked for, each such sum on a GPU becomes a sort and a dozen kernels more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def unique_indices(device: torch.device) -> Iterator[None]:
    """Within, ``index_add`` and its like go the direct way on a GPU; no two of their places may be the same."""
    mode = torch.get_deterministic_debug_mode() if device.type == "cuda" else 0
    if mode == 0:
        yield
        return
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def select_slots(stack: Tensor, slots: Tensor) -> Tensor:
    """``stack[slots]`` for slots that are all different: ``[capacity, …]`` and ``[A]`` to ``[A, …]``."""
    direct = stack.is_cuda and torch.are_deterministic_algorithms_enabled()
    if not direct:
        return stack.index_select(0, slots)
    picked: Tensor = SelectSlots.apply(stack, slots)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    return picked


class SelectSlots(torch.autograd.Function):
    """``index_select`` along the first axis, whose backward goes the direct way."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, slots: Tensor) -> Tensor:
        """The rows."""
        ctx.save_for_backward(slots)
        ctx.capacity = stack.shape[0]
        return stack.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The rows' gradients in their places, zeros elsewhere."""
        (gradient,), (slots,) = gradients, ctx.saved_tensors
        whole = gradient.new_zeros(ctx.capacity, *gradient.shape[1:])
        with unique_indices(gradient.device):
            return whole.index_add_(0, slots, gradient), None
