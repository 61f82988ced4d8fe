"""Folding linear branches into the layer before them: ``y = x + Σ α·δ(x) = M·x + c`` and ``x = W·h + b`` give one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.blueprints import Affine, Blueprint, Geometry, LowRank

Linear = tuple[Tensor, Tensor | None]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def foldable(module: nn.Module, model: nn.Module, blueprints: list[object]) -> bool:
    """Whether branches of these blueprints fold into ``module``: all linear, and a weight that no other module holds.

    The caller ensures that nothing stands between the layer and the branches, and that its weight is not read elsewhere.
    """
    return all(type(blueprint) in (Affine, LowRank) for blueprint in blueprints) and weight_is_its_own(module, model)


def weight_is_its_own(module: nn.Module, model: nn.Module) -> bool:
    """Whether ``module`` is a layer that does nothing beside its weights, and no other module of ``model`` holds these."""
    transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # the linear layer of transformers' GPT-2
    if type(module) not in _LAYERS and not transposed:
        return False
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or module._forward_pre_hooks:
        return False
    users = [m for m in model.modules() if any(p is mine for p in m._parameters.values() for mine in own.values())]
    return len(users) == 1


def matrix(blueprint: Blueprint, values: dict[str, Tensor], geometry: Geometry, seed: int) -> Linear:
    """``δ(x) = x·A + c`` of one branch over the whole site: ``A`` ``[width, width]`` and ``c`` ``[width]``, float64."""
    start, end = geometry.bounds(seed)
    wide = {name: value.double() for name, value in values.items()}
    if isinstance(blueprint, LowRank):
        inner, shift = wide["down"] @ wide["up"], None
    else:
        scale = wide["scale"]
        inner, shift = (scale if scale.dim() == 2 else torch.diag(scale)), wide["shift"]
    a = inner.new_zeros(geometry.width, geometry.width)
    first = start if blueprint.receptive_field == "chunk" else 0
    a[first : first + inner.shape[0], start:end] = inner
    if shift is None:
        return a, None
    c = inner.new_zeros(geometry.width)
    c[start:end] = shift
    return a, c


@torch.no_grad()
def fold(module: nn.Module, terms: list[tuple[float, Linear]]) -> None:
    """Change the layer so that it gives ``x + Σ α·(x·A + c)``; done in float64. Adds a bias where a shift needs one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    width = terms[0][1][0].shape[0]
    m = torch.eye(width, dtype=torch.float64, device=weight.device)
    c = torch.zeros(width, dtype=torch.float64, device=weight.device)
    for alpha, (a, shift) in terms:
        m += alpha * a.to(m.device)  # a host that was sharded is gathered on the CPU
        c += 0.0 if shift is None else alpha * shift.to(m.device)
    changed = weight.double() @ m if type(module).__name__ == "Conv1D" else (m.t() @ weight.double().flatten(1)).view(weight.shape)
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    shifted = c if bias is None else bias.double() @ m + c
    weight.copy_(changed)
    if isinstance(bias, Tensor):
        bias.copy_(shifted)
    elif any(shift is not None for _, (_, shift) in terms):
        module.bias = nn.Parameter(shifted.to(weight.dtype), requires_grad=weight.requires_grad)
