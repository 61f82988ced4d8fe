"""Blueprints as plain modules of torch, which an exported model holds in place of branches.

A blueprint of your own needs nothing here: its ``forward`` is kept (``Stacked``), unless it has a method
``plain(values, spatial) -> nn.Module`` that says better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from esper.blueprints.affine import Affine
from esper.blueprints.base import ACTIVATION_MODULES, Blueprint, Parameters
from esper.blueprints.conv import Conv
from esper.blueprints.glu import GLU
from esper.blueprints.low_rank import LowRank
from esper.blueprints.mlp import MLP

#: The parameters that δ is linear in: a branch's α goes into them.
LINEAR_PARAMETERS: dict[type[Blueprint], tuple[str, ...]] = {
    Affine: ("scale", "shift"),
    LowRank: ("up",),
    MLP: ("w2", "b2"),
    GLU: ("w2", "b2"),
    Conv: ("pointwise", "bias"),
}


class FeatureAffine(nn.Module):
    """``x·scale + shift``, feature by feature; ``spatial`` axes follow the features where there are any."""

    def __init__(self, scale: Tensor, shift: Tensor, spatial: int) -> None:
        super().__init__()
        shape = (-1, *([1] * spatial))
        self.scale = nn.Parameter(scale.reshape(shape).clone())
        self.shift = nn.Parameter(shift.reshape(shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        return x * self.scale + self.shift


class Gated(nn.Module):
    """``last(σ(gate(x)) ⊙ value(x))``."""

    def __init__(self, gate: nn.Module, value: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.gate, self.value, self.last = gate, value, last

    def forward(self, x: Tensor) -> Tensor:
        """The output of the gated linear unit."""
        added: Tensor = self.last(self.gate(x).sigmoid() * self.value(x))
        return added


class Stacked(nn.Module):
    """A blueprint's own ``forward`` on the parameters of one branch; features are along ``dim``."""

    def __init__(self, blueprint: Blueprint, values: Parameters, spatial: int) -> None:
        super().__init__()
        self.blueprint, self.dim = blueprint, -1 - spatial
        self.values = nn.ParameterDict()
        for name, value in values.items():
            self.values[name] = nn.Parameter(value.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The features that the branch reads → its addition, before α."""
        stacked = {name: value.unsqueeze(0).to(x.dtype) for name, value in self.values.items()}
        if self.blueprint.spatial:
            return self.blueprint.forward(stacked, x.unsqueeze(1)).squeeze(1)
        moved = x.movedim(self.dim, -1)
        rows = self.blueprint.forward(stacked, moved.reshape(1, -1, moved.shape[-1]))
        return rows.reshape(*moved.shape[:-1], rows.shape[-1]).movedim(-1, self.dim)


def plain_net(blueprint: Blueprint, values: Parameters, spatial: int, alpha: float) -> tuple[nn.Module, float]:
    """(module, factor): ``factor · module(x)`` is ``α·net(x)``; α is in the module, and the factor 1, where that can be.

    Args:
        values: parameters of one branch, without padding.
        spatial: axes behind the features, 0 where the features are the last axis.
    """
    own: Callable[..., nn.Module] | None = getattr(blueprint, "plain", None)
    if own is not None:
        return own(values, spatial), alpha
    build = _BUILDERS.get(type(blueprint))
    if build is None:
        return Stacked(blueprint, values, spatial), alpha
    last = LINEAR_PARAMETERS[type(blueprint)]
    scaled = {name: value * alpha if name in last else value for name, value in values.items()}
    return build(blueprint, scaled, spatial), 1.0


def linear(weight: Tensor, bias: Tensor | None, spatial: int) -> nn.Module:
    """``x·weight + bias`` (weight ``[Cin, C]``) along the features: a linear layer, or a convolution of one position."""
    inputs, outputs = weight.shape
    module: nn.Linear | nn.Conv1d | nn.Conv2d
    if spatial == 0:
        module = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias is not None)
    else:
        kind = nn.Conv1d if spatial == 1 else nn.Conv2d
        module = nn.utils.skip_init(kind, inputs, outputs, 1, bias=bias is not None)
    module.weight = nn.Parameter(weight.t().reshape(module.weight.shape).clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module


def _affine(blueprint: Any, values: Parameters, spatial: int) -> nn.Module:
    if blueprint.receptive_field == "chunk":
        return FeatureAffine(values["scale"], values["shift"], spatial)
    return linear(values["scale"], values["shift"], spatial)


def _low_rank(blueprint: Any, values: Parameters, spatial: int) -> nn.Module:
    return nn.Sequential(linear(values["down"], None, spatial), linear(values["up"], None, spatial))


def _mlp(blueprint: Any, values: Parameters, spatial: int) -> nn.Module:
    first, last = linear(values["w1"], values["b1"], spatial), linear(values["w2"], values["b2"], spatial)
    return nn.Sequential(first, ACTIVATION_MODULES[blueprint.activation](), last)


def _glu(blueprint: Any, values: Parameters, spatial: int) -> nn.Module:
    gate, value = (linear(values[f"w{part}"], values[f"b{part}"], spatial) for part in ("g", "v"))
    return Gated(gate, value, linear(values["w2"], values["b2"], spatial))


def _conv(blueprint: Any, values: Parameters, spatial: int) -> nn.Module:
    depthwise = values["depthwise"]
    middle, kernel = depthwise.shape[0], depthwise.shape[2]
    channels = middle // blueprint.expand
    kind = nn.Conv1d if spatial == 1 else nn.Conv2d
    first = nn.utils.skip_init(kind, channels, middle, kernel, padding=kernel // 2, groups=channels, bias=False)
    first.weight = nn.Parameter(depthwise.clone())
    norm = nn.GroupNorm(1, middle, device=depthwise.device)
    norm.weight, norm.bias = nn.Parameter(values["norm_scale"].clone()), nn.Parameter(values["norm_shift"].clone())
    last = linear(values["pointwise"].t(), values["bias"], spatial)
    return nn.Sequential(first, norm, ACTIVATION_MODULES[blueprint.activation](), last)


_BUILDERS: dict[type[Blueprint], Callable[[Any, Parameters, int], nn.Module]] = {
    Affine: _affine,
    LowRank: _low_rank,
    MLP: _mlp,
    GLU: _glu,
    Conv: _conv,
}
