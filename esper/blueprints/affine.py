"""``affine``: δ(x) = x·scale + shift, feature by feature; folds into the linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints.base import Blueprint, Parameters, linear
from esper.blueprints.config import AffineSettings
from esper.blueprints.geometry import Geometry


@dataclass
class Affine(AffineSettings, Blueprint):
    """Two numbers a feature with the field ``chunk``; with ``layer`` a matrix from the whole site to the chunk."""

    output = "scale"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``scale``: ``[C]`` or ``[Cin, C]``; ``shift``: ``[C]``."""
        scale = (writes,) if self.receptive_field == "chunk" else (reads, writes)
        return {"scale": scale, "shift": (writes,)}

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``x·scale + shift``."""
        scale, shift = parameters["scale"], parameters["shift"]
        if self.receptive_field == "chunk":
            return torch.addcmul(shift.unsqueeze(1), x, scale.unsqueeze(1))
        return linear(x, scale, shift)
