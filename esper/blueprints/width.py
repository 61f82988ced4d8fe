"""``width``: hidden units or channels for the host itself, ``δ = act(x·w1 + b1)·w2`` on the output of the layer behind a hidden one.

``x`` is what the hidden layer reads, so that at α = 1 the network is the host with a wider hidden layer, and is exported as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    part_of_layer = True

    def misfit(self, geometry: Geometry) -> str | None:
        """Only a layer that reads a hidden layer's activation, and nothing else; normalized channels by whole groups."""
        if not isinstance(geometry, BehindHidden):
            names = ", ".join(WIDTH_ACTIVATIONS[:-1])
            return (
                f"width needs a layer behind a hidden layer: a linear layer or convolution and {names} or {WIDTH_ACTIVATIONS[-1]}, with "
                "nothing but dropout or a group norm between, as blueprint=width with sites.match=auto finds them"
            )
        alike = self.units // 2 if self.start == "paired" else self.units
        if geometry.group and alike % geometry.group:
            pairs = "two times " if self.start == "paired" else ""
            return f"the channels there are normalized in groups of {geometry.group}; blueprint.units must be a multiple of {pairs}that"
        if geometry.kernels and self.start in ("gradmax", "tiny"):
            return f"start={self.start} is for linear layers; a convolution's channels start as zero or paired"
        return None

    def reads(self, geometry: Geometry, writes: int) -> int:
        """What the hidden layer reads."""
        return geometry.source if isinstance(geometry, BehindHidden) else geometry.width

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``w1``: ``[Cin, U]``, ``b1``: ``[U]`` where the hidden layer has a bias, ``w2``: ``[U, C]``.

        Of convolutions ``w1``: ``[U, Cin, k…]``, ``w2``: ``[C, U, k…]``; ``norm_scale``, ``norm_shift``: ``[U]`` where they are normalized.
        """
        bias = {"b1": (self.units,)} if getattr(geometry, "bias", True) else {}
        if not isinstance(geometry, BehindHidden) or not geometry.kernels:
            return {"w1": (reads, self.units), **bias, "w2": (self.units, writes)}
        norm = {"norm_scale": (self.units,), "norm_shift": (self.units,)} if geometry.group else {}
        first, second = geometry.kernels
        return {"w1": (self.units, reads, *first), **bias, **norm, "w2": (writes, self.units, *second)}

    def fan_in(self, name: str, shape: tuple[int, ...]) -> int:
        """Inputs of a unit; filters come with their outputs first."""
        return math.prod(shape[1:]) if len(shape) > 2 else super().fan_in(name, shape)

    def initialise(self, reads: int, writes: int, geometry: Geometry, generator: torch.Generator, silent: bool) -> Parameters:
        """Incoming weights as every blueprint; outgoing ones zero, or, in pairs with the same incoming ones, opposite."""
        values = super().initialise(reads, writes, geometry, generator, silent=True)
        if "norm_scale" in values:
            values["norm_scale"].fill_(1.0)
        if self.start == "paired":
            units, half, bound = 0 if values["w1"].dim() > 2 else 1, self.units // 2, 1.0 / math.sqrt(self.units)
            first = values["w1"].narrow(units, 0, half)
            values["w1"] = torch.cat([first, first], units)
            drawn = values["w2"].narrow(1 - units, 0, half).uniform_(-bound, bound, generator=generator)
            values["w2"] = torch.cat([drawn, -drawn], 1 - units)
        return values

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``act(x·w1 + b1)·w2``."""
        return linear(ACTIVATIONS[self.activation](linear(x, parameters["w1"], parameters.get("b1"))), parameters["w2"])


@dataclass
class WideConv(Width):
    """``width`` where the layers are convolutions: ``conv(act(norm(conv(x, w1))), w2)``; at a site one branch at a time."""

    group: int = 0
    eps: float = 1e-5
    paths: tuple[tuple[Any, Any, Any], ...] = ()
    """Stride, padding and dilation of the hidden layer and of the site's own."""

    spatial = True

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``[batch, 1, Cin, …] → [batch, 1, C, …]``."""
        convolve = functional.conv1d if x.dim() == 4 else functional.conv2d
        (first, second), bias = self.paths, parameters.get("b1")
        hidden = convolve(x.squeeze(1), parameters["w1"].squeeze(0), None if bias is None else bias.squeeze(0), *first)
        if self.group:
            scale, shift = (parameters[name].squeeze(0) for name in ("norm_scale", "norm_shift"))
            hidden = functional.group_norm(hidden, self.units // self.group, scale, shift, self.eps)
        return convolve(ACTIVATIONS[self.activation](hidden), parameters["w2"].squeeze(0), None, *second).unsqueeze(1)
