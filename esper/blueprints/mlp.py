"""``mlp``: δ(x) = act(x·w1 + b1)·w2 + b2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from esper.blueprints.base import ACTIVATIONS, Blueprint, Parameters, linear
from esper.blueprints.config import MLPSettings
from esper.blueprints.geometry import Geometry


@dataclass
class MLP(MLPSettings, Blueprint):
    """One hidden layer of ``hidden`` units."""

    output = "w2"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``w1``: ``[Cin, H]``, ``b1``: ``[H]``, ``w2``: ``[H, C]``, ``b2``: ``[C]``."""
        return {"w1": (reads, self.hidden), "b1": (self.hidden,), "w2": (self.hidden, writes), "b2": (writes,)}

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``act(x·w1 + b1)·w2 + b2``."""
        hidden = ACTIVATIONS[self.activation](linear(x, parameters["w1"], parameters["b1"]))
        return linear(hidden, parameters["w2"], parameters["b2"])
