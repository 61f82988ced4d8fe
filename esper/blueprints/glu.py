"""``glu``: δ(x) = (σ(x·wg + bg) ⊙ (x·wv + bv))·w2 + b2, a gated linear unit (Dauphin et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from esper.blueprints.base import Blueprint, Parameters, linear, sigmoid
from esper.blueprints.config import GLUSettings
from esper.blueprints.geometry import Geometry


@dataclass
class GLU(GLUSettings, Blueprint):
    """One gated hidden layer of ``hidden`` units."""

    output = "w2"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``wg``, ``wv``: ``[Cin, H]``, ``bg``, ``bv``: ``[H]``, ``w2``: ``[H, C]``, ``b2``: ``[C]``."""
        into, hidden = (reads, self.hidden), (self.hidden,)
        return {"wg": into, "bg": hidden, "wv": into, "bv": hidden, "w2": (self.hidden, writes), "b2": (writes,)}

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``(σ(x·wg + bg) ⊙ (x·wv + bv))·w2 + b2``."""
        gate = sigmoid(linear(x, parameters["wg"], parameters["bg"]))
        return linear(gate * linear(x, parameters["wv"], parameters["bv"]), parameters["w2"], parameters["b2"])
