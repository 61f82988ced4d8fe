"""The chunk-receptive branches of a site in one pass a direction: the site's groups handed to ``esper.kernels``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.blueprints import MLP, Blueprint, Geometry, SlotBank
from esper.blueprints.unique_indices import unique_indices
from esper.kernels import Kernels
from esper.kernels.branch_kinds import KINDS
from esper.kernels.dispatch import fits
from esper.seeds.branch_groups import BranchGroups, Group
from esper.seeds.device_copy import tensor_on

SUBTRACT, FROZEN = 1, 2
"""Bits of a route: δ = net − id, and parameters that do not learn."""


@dataclass
class FusedGroup:
    """Groups with at most one branch a seed, in the form of the kernels; for the rest of the engine it is a group like others.

    ``seeds`` ``[A]`` are the branches' seeds; ``route`` int32 ``[S, 3]`` says each seed's bank, its slot, whether δ = net − id and whether
    the branch is frozen.
    """

    site: str
    kernels: Kernels
    geometry: Geometry
    groups: list[Group]
    banks: list[SlotBank]
    kinds: str
    branches: list[int]
    seeds: Tensor
    route: Tensor
    alpha: Tensor
    failures: Tensor
    key: tuple[str, int, bool]
    forwards: int = 0

    def bank_parameters(self) -> list[nn.Parameter]:
        """The stacked parameters these branches are rows of."""
        return [stack for bank in self.banks for stack in bank.stacks.values()]

    def cost_key(self) -> tuple[str, int, bool]:
        """The key on which the MACs of a forward and backward depend."""
        return self.key

    def split(self) -> list[Group]:
        """The groups it was made of, with the alphas of now."""
        for group, alpha in zip(self.groups, self.alpha.split([len(g.branches) for g in self.groups]), strict=True):
            group.alpha.copy_(alpha)
        return self.groups

    def __call__(self, x: Tensor, statistics: Tensor | None, ratios: dict[int, Tensor] | None) -> Tensor:
        """``x + Σ α·δ(x)``, shaped as ``x``; counts contained branches, and notes ``ratios`` where ``statistics`` are at hand."""
        dim = self.geometry.dim
        rows = x if dim == -1 else x.movedim(dim, -1)
        with unique_indices(x.device):
            alpha = torch.zeros(self.geometry.seeds, device=x.device).index_copy(0, self.seeds, self.alpha.float())
        grown = self.kernels.branches(self.site, rows, alpha, self.route, self.kinds, self._parameters())
        self.failures += (self.alpha > 0) & (grown.live.detach()[self.seeds] == 0)
        if ratios is not None and statistics is not None:
            self._note_ratios(ratios, grown.power.detach(), statistics, x.numel() // self.geometry.width)
        return grown.y if dim == -1 else grown.y.movedim(-1, dim)

    def _parameters(self) -> list[Tensor]:
        return [bank.stacks[name] for bank, kind in zip(self.banks, self.kinds.split(","), strict=True) for name in KINDS[kind].stack_names]

    def _note_ratios(self, ratios: dict[int, Tensor], power: Tensor, statistics: Tensor, rows: int) -> None:
        owned = [end - start for start, end in (self.geometry.bounds(seed) for seed in self.seeds.tolist())]
        sizes = torch.tensor(owned, device=power.device) * rows
        below = statistics[self.seeds, 1] + statistics[self.seeds, 0].square()
        values = self.alpha * (power[self.seeds] / sizes / below.clamp(min=1e-24)).sqrt()
        ratios.update(zip(self.branches, values.unbind(), strict=True))


def fuse(
    groups: BranchGroups, site: str, geometry: Geometry, seed_of: dict[int, int], kernels: Kernels | None, device: torch.device
) -> BranchGroups:
    """The groups with one leading ``FusedGroup`` that holds all that the kernels can take; unchanged where the kernels are not used.

    ``seed_of`` gives the seed of each branch. A second generation on the same chunk is not included: a seed has one branch.
    """
    if kernels is None or not kernels.usable_on(device):
        return groups
    taken: list[Group] = []
    seeds: set[int] = set()
    for group in groups:
        if isinstance(group, Group) and kind_of(group.bank.blueprint) is not None:
            mine = {seed_of[branch] for branch in group.branches}
            if not mine & seeds and bank_fits(group.bank, geometry):
                taken.append(group)
                seeds |= mine
    if not taken:
        return groups
    left = [group for group in groups if not any(group is other for other in taken)]
    return [_fused_group(taken, site, geometry, seed_of, kernels), *left]


def _fused_group(groups: list[Group], site: str, geometry: Geometry, seed_of: dict[int, int], kernels: Kernels) -> FusedGroup:
    device = groups[0].alpha.device
    route = torch.full((geometry.seeds, 3), -1, dtype=torch.int32, device=device)
    for number, group in enumerate(groups):
        bits = torch.zeros_like(group.slots)
        if group.residual is not None:
            bits += group.residual.to(bits.dtype) * SUBTRACT
        if group.learning is not None:
            bits += (~group.learning).to(bits.dtype) * FROZEN
        entries = torch.stack([torch.full_like(bits, number), group.slots, bits], 1).int()
        with unique_indices(device):
            route.index_copy_(0, tensor_on([seed_of[branch] for branch in group.branches], device), entries)
    branches = [branch for group in groups for branch in group.branches]
    return FusedGroup(
        site=site,
        kernels=kernels,
        geometry=geometry,
        groups=groups,
        banks=[group.bank for group in groups],
        kinds=",".join(str(kind_of(group.bank.blueprint)) for group in groups),
        branches=branches,
        seeds=tensor_on([seed_of[branch] for branch in branches], device),
        route=route,
        alpha=torch.cat([group.alpha for group in groups]),
        failures=torch.zeros(len(branches), device=device),
        key=(
            "fused " + ",".join(f"{kind_of(g.bank.blueprint)}×{len(g.branches)}" for g in groups),
            len(branches),
            any(g.learns for g in groups),
        ),
    )


def kind_of(blueprint: Blueprint) -> str | None:
    """The kernels' name for the branches of this blueprint, or None where they do not support it."""
    return None if blueprint.receptive_field != "chunk" else layer_or_chunk_kind(blueprint)


def layer_or_chunk_kind(blueprint: Blueprint) -> str | None:
    """The same, whatever the branches read."""
    if blueprint.spatial:
        return None
    name = f"mlp_{blueprint.activation}" if isinstance(blueprint, MLP) else blueprint.name
    return name if name in KINDS and set(KINDS[name].stack_names) == set(blueprint.shapes(1, 1, Geometry(1, 1))) else None


def bank_fits(bank: SlotBank, geometry: Geometry) -> bool:
    """Whether the kernels can take this bank's widths."""
    kind = kind_of(bank.blueprint)
    assert kind is not None
    return fits(geometry.width, geometry.seeds, kind, [bank.stacks[name] for name in KINDS[kind].stack_names])
