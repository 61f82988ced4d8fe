"""``conv``: a separable convolution for sites of convolutions: depthwise, group norm, activation, pointwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from esper.blueprints.base import ACTIVATIONS, Blueprint, Parameters
from esper.blueprints.config import ConvSettings
from esper.blueprints.geometry import Geometry


@dataclass
class Conv(ConvSettings, Blueprint):
    """δ(x) = pointwise(act(norm(depthwise(x)))); one normalization group a branch, over channels and positions."""

    spatial = True
    output = "pointwise"

    def misfit(self, geometry: Geometry) -> str | None:
        """Only convolution sites, and odd kernels, so that the positions stay where they are."""
        if geometry.spatial == 0:
            return "conv needs the output of a convolution (channels and positions)"
        return None if self.kernel % 2 else f"conv needs an odd kernel, got {self.kernel}"

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """``depthwise``: ``[Cin·E, 1, k…]``, ``norm_scale``, ``norm_shift``: ``[Cin·E]``, ``pointwise``: ``[C, Cin·E]``, ``bias``."""
        middle = reads * self.expand
        kernel = (self.kernel,) * geometry.spatial
        return {
            "depthwise": (middle, 1, *kernel),
            "norm_scale": (middle,),
            "norm_shift": (middle,),
            "pointwise": (writes, middle),
            "bias": (writes,),
        }

    def fan_in(self, name: str, shape: tuple[int, ...]) -> int:
        """Kernel positions for the depthwise part, channels for the pointwise one."""
        return {"depthwise": math.prod(shape[1:]), "pointwise": shape[-1]}.get(name, 0)

    def initialise(self, reads: int, writes: int, geometry: Geometry, generator: torch.Generator, silent: bool) -> Parameters:
        """As every blueprint, with the norm's scale at one."""
        values = super().initialise(reads, writes, geometry, generator, silent)
        values["norm_scale"].fill_(1.0)
        return values

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``[batch, A or 1, Cin, …] → [batch, A, C, …]`` with all branches in grouped convolutions.

        Channels that only pad an uneven chunk are zero in ``x`` and have zero scale, and the norm counts real ones alone.
        """
        branches, middle = parameters["depthwise"].shape[:2]
        batch, positions = x.shape[0], x.shape[3:]
        x = x.expand(batch, branches, *x.shape[2:]).repeat_interleave(self.expand, dim=2).flatten(1, 2)
        weight = parameters["depthwise"].flatten(0, 1)
        convolve = functional.conv1d if len(positions) == 1 else functional.conv2d
        y = convolve(x, weight, padding=self.kernel // 2, groups=branches * middle)
        y = self._normalise(y.view(batch, branches, middle, *positions), parameters)
        y = ACTIVATIONS[self.activation](y).flatten(3)
        y = torch.matmul(parameters["pointwise"], y) + parameters["bias"].unsqueeze(-1)
        return y.view(batch, branches, -1, *positions)

    def _normalise(self, y: Tensor, parameters: Parameters) -> Tensor:
        scale, shift = parameters["norm_scale"], parameters["norm_shift"]
        real = (scale != 0).to(y.dtype)
        per_channel = (1, *real.shape, *([1] * (y.dim() - 3)))
        mask = real.view(per_channel)
        axes = tuple(range(2, y.dim()))
        count = real.sum(1).clamp(min=1.0).view(1, -1, *([1] * (y.dim() - 2))) * math.prod(y.shape[3:])
        mean = (y * mask).sum(axes, keepdim=True) / count
        variance = ((y - mean) * mask).square().sum(axes, keepdim=True) / count
        normal = (y - mean) * torch.rsqrt(variance + 1e-5)
        return normal * scale.view(per_channel) + shift.view(per_channel)

    def macs(self, geometry: Geometry, seed: int = 0) -> int:
        """Positions × (depthwise kernel + pointwise matrix)."""
        start, end = geometry.bounds(seed)
        shapes = self.shapes(self.reads(geometry, end - start), end - start, geometry)
        return geometry.positions * (math.prod(shapes["depthwise"]) + math.prod(shapes["pointwise"]))
