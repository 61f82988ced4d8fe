"""Small tensors from the CPU to where the model is, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device``; on a GPU it is under way when this returns, and in order with later launches."""
    if device.type == "cpu":
        return values
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def tensor_on(values: list[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.tensor(values, device=device)``, likewise."""
    return to_device(torch.tensor(values, dtype=dtype), device)
