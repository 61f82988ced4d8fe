"""A host of which one layer is crippled, and the data on which it is felt.

The target is a sum of functions, each of a part of the input of its own, and the host has a layer for each part: what one layer cannot say
no other can say for it. In the crippled layer all but a few units are silent for good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.utils.data import TensorDataset, random_split

from esper.tasks import task_of
from esper.tasks.base import Task

PART = 4
"""Inputs that a layer reads."""
TEACHER = 10
"""Units of the function that each layer has to learn."""
NOISE = 0.1
SLOPE = 0.5
"""Of the leaky ReLU: PART working units lose nothing of their input, so a branch behind them can say what they do not."""


class Layer(nn.Module):
    """A linear layer with a ReLU, whose output is multiplied by ``working`` ``[width]``: 0 silences a unit."""

    working: Tensor

    def __init__(self, width: int, alive: int) -> None:
        super().__init__()
        self.linear = nn.Linear(PART, width)
        working = torch.zeros(width)
        units = torch.arange(alive) * width // alive
        working[units] = 1.0
        self.register_buffer("working", working)
        if alive < width:  # what is left of it sees its whole input
            with torch.no_grad():
                self.linear.weight[units] = torch.eye(PART)[torch.arange(alive) % PART]

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, width]`` of ``[N, PART]``."""
        return leaky_relu(self.linear(inputs), SLOPE) * self.working


class Host(nn.Module):
    """``layers`` of them side by side and a linear ``head`` over all; layer ``crippled`` (-1: none) has ``alive`` working units."""

    growth_sites = ("layer?",)

    def __init__(self, layers: int = 6, width: int = 32, crippled: int = -1, alive: int = PART) -> None:
        super().__init__()
        self.layers = layers
        for number in range(layers):
            self.add_module(f"layer{number}", Layer(width, alive if number == crippled else width))
        self.head = nn.Linear(layers * width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, 1]`` of ``[N, layers · PART]``."""
        parts = inputs.split(PART, dim=1)
        return self.head(torch.cat([self.get_submodule(f"layer{number}")(part) for number, part in enumerate(parts)], dim=1))


def squared(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The squared error, one value a sample."""
    return (output.squeeze(1) - batch[1]).square()


def sums(layers: int = 6, samples: int = 6000, seed: int = 0) -> Task:
    """The sum of ``layers`` ReLU networks that are drawn from ``seed``, each of unit variance over its own part of the input."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, layers, PART, generator=draws)
    first = torch.randn(layers, PART, TEACHER, generator=draws)
    shift = 0.5 * torch.randn(layers, 1, TEACHER, generator=draws)
    last = torch.randn(layers, TEACHER, 1, generator=draws)
    parts = ((x.transpose(0, 1) @ first + shift).abs() @ last).squeeze(2)
    parts = (parts - parts.mean(1, keepdim=True)) / parts.std(1, keepdim=True)
    y = parts.sum(0) + NOISE * torch.randn(samples, generator=draws)
    sets = random_split(TensorDataset(x.flatten(1), y), [0.7, 0.1, 0.1, 0.1], generator=draws)
    return task_of("sums", *sets, outputs=1, loss=squared, metrics={"error": ("min", squared)})
