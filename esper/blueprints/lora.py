"""``lora``: ranks for a linear layer of the host, ``δ = scaling·(h·down)·up`` of what the layer reads (Hu et al. 2021).

At α = 1 it is the layer with ``scaling·(down·up)`` added to its weights, and is exported as that; ``esper.integrations.peft`` saves it as
an adapter in the format of peft.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from esper.blueprints.base import Blueprint, Parameters, linear
from esper.blueprints.config import LoRASettings
from esper.blueprints.geometry import Geometry, LinearLayer


@dataclass
class LoRA(LoRASettings, Blueprint):
    """Further ``rank`` ranks for the layer. ``down`` is drawn as in torch's linear layers, ``up`` is zero: growing moves no output."""

    output = "up"
    reads_input = True
    part_of_layer = True

    def misfit(self, geometry: Geometry) -> str | None:
        """Only linear layers, and the whole of each."""
        if not isinstance(geometry, LinearLayer):
            return "lora adds ranks to linear layers where it is the run's own blueprint (blueprint=lora), and to nothing else"
        if self.rank > min(geometry.source, geometry.width):
            return f"a matrix of {geometry.source}×{geometry.width} has no {self.rank} ranks; lower blueprint.rank"
        return None

    def reads(self, geometry: Geometry, writes: int) -> int:
        """What the layer reads."""
        return geometry.source if isinstance(geometry, LinearLayer) else geometry.width

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``down``: ``[Cin, R]`` and ``up``: ``[R, C]``, the transposes of what peft calls ``lora_A`` and ``lora_B``."""
        return {"down": (reads, self.rank), "up": (self.rank, writes)}

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``scaling·(x·down)·up``; the scaling where there are fewest numbers."""
        return linear(self.scaling * linear(x, parameters["down"]), parameters["up"])
