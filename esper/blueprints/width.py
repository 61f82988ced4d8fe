"""``width``: hidden units for the host itself, ``δ = act(x·w1 + b1)·w2`` on the output of the layer behind a hidden layer.

``x`` is what the hidden layer reads, so that at α = 1 the network is the host with a wider hidden layer, and is exported as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from esper.blueprints.base import Blueprint, Parameters, linear
from esper.blueprints.config import WIDTH_ACTIVATIONS, WidthSettings
from esper.blueprints.geometry import BehindHidden, Geometry

ACTIVATIONS = {name: getattr(functional if name != "tanh" else torch, name) for name in WIDTH_ACTIVATIONS}


@dataclass
class Width(WidthSettings, Blueprint):
    """New hidden units; what depends on the host is set when they germinate (``esper.engine.learning.new_units``)."""

    output = "w2"

    def fits(self, geometry: Geometry) -> str | None:
        """Only a linear layer that reads a hidden layer's activation, and nothing else."""
        if isinstance(geometry, BehindHidden):
            return None
        names = ", ".join(WIDTH_ACTIVATIONS[:-1])
        return (
            f"width needs a linear layer behind a hidden layer: a linear layer and {names} or {WIDTH_ACTIVATIONS[-1]}, with nothing "
            "but dropout between, as blueprint=width with sites.match=auto finds them"
        )

    def reads(self, geometry: Geometry, writes: int) -> int:
        """What the hidden layer reads."""
        return geometry.source if isinstance(geometry, BehindHidden) else geometry.width

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``w1``: ``[Cin, U]``, ``b1``: ``[U]`` where the hidden layer has a bias, ``w2``: ``[U, C]``."""
        bias = {"b1": (self.units,)} if getattr(geometry, "bias", True) else {}
        return {"w1": (reads, self.units), **bias, "w2": (self.units, writes)}

    def initialise(self, reads: int, writes: int, geometry: Geometry, generator: torch.Generator, silent: bool) -> Parameters:
        """Incoming weights as every blueprint; outgoing ones zero, or, in pairs with the same incoming ones, opposite."""
        values = super().initialise(reads, writes, geometry, generator, silent=True)
        if self.start == "paired":
            half, bound = self.units // 2, 1.0 / math.sqrt(self.units)
            values["w1"][:, half:] = values["w1"][:, :half]
            drawn = torch.empty(half, writes).uniform_(-bound, bound, generator=generator)
            values["w2"] = torch.cat([drawn, -drawn])
        return values

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``act(x·w1 + b1)·w2``."""
        return linear(ACTIVATIONS[self.activation](linear(x, parameters["w1"], parameters.get("b1"))), parameters["w2"])
