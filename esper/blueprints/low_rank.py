"""``low_rank``: δ(x) = (x·down)·up, the residual form of LoRA (Hu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from esper.blueprints.base import Blueprint, Parameters, linear
from esper.blueprints.config import LowRankSettings
from esper.blueprints.geometry import Geometry


@dataclass
class LowRank(LowRankSettings, Blueprint):
    """A linear map of rank ``rank`` from the features that the branch reads to its chunk."""

    output = "up"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``down``: ``[Cin, R]``, ``up``: ``[R, C]``."""
        return {"down": (reads, self.rank), "up": (self.rank, writes)}

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``(x·down)·up``."""
        return linear(linear(x, parameters["down"]), parameters["up"])
