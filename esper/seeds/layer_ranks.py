"""Ranks that grew on linear layers: put into the layer's own weight, or told as the two factors that other programs know (peft)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.blueprints import LoRA, SlotBank
from esper.seeds.branches import Branch
from esper.seeds.registry import SeedRegistry


def ranks_of(branch: Branch, registry: SeedRegistry) -> int:
    """Ranks that a branch adds to its layer, 0 for a branch of another kind."""
    blueprint = registry.blueprints[branch.blueprint]
    return blueprint.rank if isinstance(blueprint, LoRA) else 0


@torch.no_grad()
def factors(registry: SeedRegistry, branches: list[Branch]) -> tuple[Tensor, Tensor]:
    """``down`` ``[Cin, R]`` and ``up`` ``[R, C]`` of all ranks of these branches of one layer, by id.

    ``up`` holds every branch's α; ``scaling·down·up`` is what they add to the transposed weight.
    """
    downs, ups = [], []
    for branch in branches:
        bank = registry.layers[branch.site].bank(branch.blueprint)
        assert isinstance(bank, SlotBank)
        values = bank.values(branch.slot)
        downs.append(values["down"])
        ups.append(float(registry.branches.alpha[branch.id]) * values["up"])
    return torch.cat(downs, 1), torch.cat(ups)


@torch.no_grad()
def add_to_weight(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """Add ``down·up`` to the layer's weight, in place and computed in float64."""
    weight = layer.get_parameter("weight")
    added = down.to(weight.device).double() @ up.to(weight.device).double()
    weight.copy_(weight.double() + (added.t() if isinstance(layer, nn.Linear) else added))
