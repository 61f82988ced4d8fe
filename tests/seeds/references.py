"""Each blueprint spelled out for one branch, with no batching: what the banks must compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from esper.blueprints import GLU, MLP, Affine, Blueprint, Conv, Geometry, LowRank, SlotBank
from esper.lifecycle import Stage
from esper.seeds import Branch
from esper.seeds.branch_groups import GroupMember

BLUEPRINTS: dict[str, Blueprint] = {
    "affine-chunk": Affine(),
    "affine-layer": Affine(receptive_field="layer"),
    "low_rank-chunk": LowRank(receptive_field="chunk", rank=2),
    "low_rank-layer": LowRank(rank=3),
    "mlp-chunk": MLP(receptive_field="chunk", hidden=4),
    "mlp-layer": MLP(hidden=3, activation="gelu"),
    "glu-chunk": GLU(receptive_field="chunk", hidden=4),
    "glu-layer": GLU(hidden=3),
}
CONVS: dict[str, Blueprint] = {
    "conv-chunk": Conv(receptive_field="chunk", expand=2),
    "conv-layer": Conv(receptive_field="layer", kernel=5, expand=1, activation="silu"),
}
#: name -> (geometry, shape of an activation): uneven chunks, features last, channels first in one and two dimensions.
SITES: dict[str, tuple[Geometry, tuple[int, ...]]] = {
    "features": (Geometry(8, 4), (5, 8)),
    "uneven": (Geometry(7, 3), (5, 7)),
    "sequence": (Geometry(7, 2, positions=3), (4, 3, 7)),
    "series": (Geometry(5, 2, dim=1, spatial=1, positions=6), (4, 5, 6)),
    "image": (Geometry(7, 3, dim=1, spatial=2, positions=20), (3, 7, 4, 5)),
}


def filled_bank(blueprint: Blueprint, geometry: Geometry, seeds: list[int], residual: bool = False) -> tuple[SlotBank, list[GroupMember]]:
    """A float64 bank with one branch a seed, nowhere silent, and the parts that put them into groups."""
    bank = SlotBank(blueprint, geometry, torch.device("cpu"))
    members = []
    draws = torch.Generator().manual_seed(5)
    for number, seed in enumerate(seeds):
        slot = bank.allocate(seed, draws, silent=False)
        for name, stack in bank.stacks.items():
            real = unpadded(bank, slot, seed)[name].shape
            with torch.no_grad():
                noise = torch.rand(real, generator=draws) - 0.5
                stack[slot][tuple(slice(size) for size in real)] += noise
        branch = Branch(number, 0, seed, seed, blueprint.name, slot, 1, "linear", 0, 0, residual, Stage.GRAFTING)
        members.append(GroupMember(branch, 0.25 + 0.25 * number, True))
    return bank.double(), members


def unpadded(bank: SlotBank, slot: int, seed: int) -> dict[str, Tensor]:
    """A slot's parameters cut to its chunk (views, so that gradients flow)."""
    start, end = bank.geometry.bounds(seed)
    shapes = bank.blueprint.shapes(bank.blueprint.reads(bank.geometry, end - start), end - start, bank.geometry)
    return {name: bank.stacks[name][slot][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def blended_one_by_one(x: Tensor, bank: SlotBank, members: list[GroupMember]) -> Tensor:
    """``x + Σ α·δ(x)`` with a loop over branches."""
    geometry = bank.geometry
    dim = geometry.dim if geometry.dim >= 0 else x.dim() - 1
    y = x.clone()
    for member in members:
        start, end = geometry.bounds(member.branch.seed)
        chunk = x.narrow(dim, start, end - start)
        reads = chunk if bank.blueprint.receptive_field == "chunk" else x
        values = unpadded(bank, member.branch.slot, member.branch.seed)
        if isinstance(bank.blueprint, Conv):
            delta = conv(bank.blueprint, values, reads)
        else:
            delta = dense(bank.blueprint, values, reads.movedim(dim, -1)).movedim(-1, dim)
        delta = delta - chunk if member.branch.residual else delta
        y = y + functional.pad((member.alpha * delta).movedim(dim, -1), (start, geometry.width - end)).movedim(-1, dim)
    return y


def dense(blueprint: Blueprint, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """``[…, Cin] → […, C]`` for one branch."""
    if isinstance(blueprint, Affine):
        return (x * p["scale"] if blueprint.receptive_field == "chunk" else x @ p["scale"]) + p["shift"]
    if isinstance(blueprint, LowRank):
        return x @ p["down"] @ p["up"]
    if isinstance(blueprint, MLP):
        return getattr(functional, blueprint.activation)(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    assert isinstance(blueprint, GLU)
    return (torch.sigmoid(x @ p["wg"] + p["bg"]) * (x @ p["wv"] + p["bv"])) @ p["w2"] + p["b2"]


def conv(blueprint: Conv, p: dict[str, Tensor], x: Tensor) -> Tensor:
    """``[batch, Cin, …] → [batch, C, …]`` for one branch, by torch's own layers."""
    convolve = functional.conv1d if x.dim() == 3 else functional.conv2d
    x = x.repeat_interleave(blueprint.expand, dim=1)
    y = convolve(x, p["depthwise"], padding=blueprint.kernel // 2, groups=x.shape[1])
    y = functional.group_norm(y, 1, p["norm_scale"], p["norm_shift"], eps=1e-5)
    y = getattr(functional, blueprint.activation)(y)
    return convolve(y, p["pointwise"].view(*p["pointwise"].shape, *([1] * (x.dim() - 2))), p["bias"])
