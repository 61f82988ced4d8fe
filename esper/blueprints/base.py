"""The base of all blueprints: shapes and start values of the parameters, the function, and its cost.

A blueprint is a configuration with pure functions; the parameters of all branches that grew from it at one site lie
stacked in a ``SlotBank``, so that one batched product serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints.config import ACTIVATION_NAMES, BlueprintSettings
from esper.blueprints.geometry import Geometry

Parameters = dict[str, Tensor]


def relu(x: Tensor) -> Tensor:
    """max(x, 0): in place, since its input is a sum of its own; but not on a view, for which autograd would copy the base."""
    return torch.relu(x) if torch.compiler.is_compiling() or x._is_view() else torch.relu_(x)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x), in place where ``relu`` is."""
    return torch.sigmoid(x) if torch.compiler.is_compiling() or x._is_view() else torch.sigmoid_(x)


#: Activations by the names that torch's functions have.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(torch.nn.functional, name) for name in ACTIVATION_NAMES}
ACTIVATIONS["relu"] = relu

_MODULES = {kind.__name__.lower(): kind for kind in vars(torch.nn.modules.activation).values() if isinstance(kind, type)}
#: The same as modules, for exported models.
ACTIVATION_MODULES: dict[str, type[torch.nn.Module]] = {name: _MODULES[name] for name in ACTIVATION_NAMES}


@dataclass
class Blueprint(BlueprintSettings):
    """Base of the stacked blueprints. ``C`` is the width that a branch writes, ``Cin`` the width it reads, ``A`` the number of branches."""

    spatial = False
    output = ""
    reads_input = False
    """Whether a branch reads what its site's module reads; else it reads the output of that module."""
    part_of_layer = False
    """Whether what grew becomes part of the host's own layers in an exported model; where such branches grow, no others do."""

    def misfit(self, geometry: Geometry) -> str | None:
        """Why a branch cannot grow at such a site, or None."""
        return None

    def shapes(self, reads: int, writes: int, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one branch."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, parameters: Parameters, x: Tensor) -> Tensor:
        """``net(x)``: ``[A or 1, rows, Cin] → [A, rows, C]``; parameters are stacked over ``A``."""
        raise NotImplementedError(type(self).__name__)

    def fan_in(self, name: str, shape: tuple[int, ...]) -> int:
        """Number of inputs that one output of this parameter sums over; 0 for one that starts at zero."""
        return shape[0] if len(shape) > 1 else 0

    def initialise(self, reads: int, writes: int, geometry: Geometry, generator: torch.Generator, silent: bool) -> Parameters:
        """Start values of one branch, float32 on the CPU.

        Weights are uniform in ±1/√fan_in (He et al. 2015 with a = √5, as ``torch.nn.Linear``). ``silent`` puts the last
        layer at zero, so that germinating changes nothing; otherwise it starts as ordinary weights do (reconstruction).
        """
        values: Parameters = {}
        for name, shape in self.shapes(reads, writes, geometry).items():
            fan = self.fan_in(name, shape)
            if fan == 0 or (silent and name == self.output):
                values[name] = torch.zeros(shape)
            else:
                bound = 1.0 / math.sqrt(fan)
                values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return values

    def reads(self, geometry: Geometry, writes: int) -> int:
        """Width a branch reads when it writes ``writes`` features."""
        return geometry.width if self.receptive_field == "layer" else writes

    def parameters(self, geometry: Geometry, seed: int = 0) -> int:
        """Parameters that a branch of this seed adds, padding not counted."""
        start, end = geometry.bounds(seed)
        shapes = self.shapes(self.reads(geometry, end - start), end - start, geometry)
        return sum(math.prod(shape) for shape in shapes.values())

    def macs(self, geometry: Geometry, seed: int = 0) -> int:
        """Multiply-accumulates of one sample's forward pass through a branch (matrix products and convolutions)."""
        start, end = geometry.bounds(seed)
        shapes = self.shapes(self.reads(geometry, end - start), end - start, geometry)
        return geometry.positions * sum(math.prod(shape) for shape in shapes.values() if len(shape) > 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x·weight + bias`` in one operation: ``[A or 1, rows, Cin]``, ``[A, Cin, C]``, ``[A, C]`` → ``[A, rows, C]``.

    The rows of convolution sites are contiguous along ``rows`` (``esper.seeds.blend``); the result then is too.
    """
    x = x.expand(weight.shape[0], -1, -1)
    if x.stride(1) == 1 and x.stride(2) != 1:
        return _product(bias.unsqueeze(2) if bias is not None else None, weight.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)
    return _product(bias.unsqueeze(1) if bias is not None else None, x, weight)


def _product(added: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
    return torch.bmm(first, second) if added is None else torch.baddbmm(added, first, second)
