"""A blueprint of one's own: shapes of one branch's parameters, and what it computes on many branches at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints import Blueprint, Geometry


@dataclass
class Sine(Blueprint):
    """δ(x) = sin(x·w1 + b1)·w2; ``output`` names the parameter that starts at zero, so that germinating changes nothing."""

    name: str = "sine"
    hidden: int = 8

    output = "w2"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        return {"w1": (reads, self.hidden), "b1": (self.hidden,), "w2": (self.hidden, writes)}

    def forward(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.matmul(x, parameters["w1"]) + parameters["b1"].unsqueeze(1)  # [branches, rows, hidden]
        return torch.matmul(hidden.sin(), parameters["w2"])
