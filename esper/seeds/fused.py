"""The chunk-receptive branches of a site in one pass a direction: the plan's groups handed to ``esper.kernels``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import MLP, Geometry, SlotBank
from esper.blueprints.once import each_once
from esper.kernels import Kernels
from esper.kernels.dispatch import fits
from esper.kernels.kinds import KINDS
from esper.seeds.plan import Group, Plan


@dataclass
class Fused:
    """Groups with at most one branch a seed, as the kernels take them; to the rest of the engine it is a group like others.

    ``seeds`` ``[A]`` are the branches' seeds; ``route`` int32 ``[S, 3]`` says each seed's bank, slot and whether δ = net − id;
    ``learning`` has, for each bank, None (all of its branches here learn) or bool ``[capacity]``.
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
    learning: list[Tensor | None]
    failures: Tensor
    key: tuple[str, int, bool]
    forwards: int = 0

    def bank_parameters(self) -> list[nn.Parameter]:
        """The stacked parameters these branches are rows of."""
        return [stack for bank in self.banks for stack in bank.stacks.values()]

    def cost_key(self) -> tuple[str, int, bool]:
        """What decides the MACs of a forward and backward."""
        return self.key

    def apart(self) -> list[Group]:
        """The groups it was made of, with the alphas of now."""
        for group, alpha in zip(self.groups, self.alpha.split([len(g.branches) for g in self.groups]), strict=True):
            group.alpha.copy_(alpha)
        return self.groups

    def __call__(self, x: Tensor, statistics: Tensor | None, ratios: dict[int, Tensor] | None) -> Tensor:
        """``x + Σ α·δ(x)``, shaped as ``x``; counts contained branches, and notes ``ratios`` where ``statistics`` are at hand."""
        dim = self.geometry.dim
        rows = x if dim == -1 else x.movedim(dim, -1)
        with each_once(x.device):
            alpha = torch.zeros(self.geometry.seeds, device=x.device).index_copy(0, self.seeds, self.alpha.float())
        grown = self.kernels.branches(self.site, rows, alpha, self.route, self.kinds, self._parameters())
        self.failures += (self.alpha > 0) & (grown.live.detach()[self.seeds] == 0)
        if ratios is not None and statistics is not None:
            self._note_ratios(ratios, grown.power.detach(), statistics, x.numel() // self.geometry.width)
        return grown.y if dim == -1 else grown.y.movedim(-1, dim)

    def _parameters(self) -> list[Tensor]:
        handed = []
        for bank, kind, learning in zip(self.banks, self.kinds.split(","), self.learning, strict=True):
            for name in KINDS[kind].order:
                stack: Tensor = bank.stacks[name]
                handed.append(stack if learning is None else _LearningRows.apply(stack, learning))
        return handed

    def _note_ratios(self, ratios: dict[int, Tensor], power: Tensor, statistics: Tensor, rows: int) -> None:
        owned = [end - start for start, end in (self.geometry.bounds(seed) for seed in self.seeds.tolist())]
        sizes = torch.tensor(owned, device=power.device) * rows
        below = statistics[self.seeds, 1] + statistics[self.seeds, 0].square()
        values = self.alpha * (power[self.seeds] / sizes / below.clamp(min=1e-24)).sqrt()
        ratios.update(zip(self.branches, values.unbind(), strict=True))


class _LearningRows(torch.autograd.Function):
    """The stack itself; backward lets through only the rows that learn."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, learning: Tensor) -> Tensor:
        ctx.save_for_backward(learning)
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (learning,) = ctx.saved_tensors
        gradient = gradients[0]
        return torch.where(learning.view(-1, *([1] * (gradient.dim() - 1))), gradient, torch.zeros_like(gradient)), None


def fuse(
    plan: Plan, site: str, geometry: Geometry, seed_of: dict[int, int], kernels: Kernels | None, device: torch.device
) -> Plan:
    """The plan with what the kernels can take in one leading ``Fused``; as it is where they are not used.

    ``seed_of`` gives the seed of each branch. A second generation on the same chunk stays outside: one branch a seed.
    """
    if kernels is None or not kernels.takes(device):
        return plan
    taken: list[Group] = []
    seeds: set[int] = set()
    for group in plan:
        if isinstance(group, Group) and _kind(group.bank) is not None:
            mine = {seed_of[branch] for branch in group.branches}
            if not mine & seeds and _fits(group.bank, geometry):
                taken.append(group)
                seeds |= mine
    if not taken:
        return plan
    left = [group for group in plan if not any(group is other for other in taken)]
    return [_fused(taken, site, geometry, seed_of, kernels), *left]


def _fused(groups: list[Group], site: str, geometry: Geometry, seed_of: dict[int, int], kernels: Kernels) -> Fused:
    device = groups[0].alpha.device
    route = torch.full((geometry.seeds, 3), -1, dtype=torch.int32)
    learning: list[Tensor | None] = []
    for number, group in enumerate(groups):
        residual = [0.0] * len(group.branches) if group.residual is None else group.residual.tolist()
        for branch, slot, flag in zip(group.branches, group.slots.tolist(), residual, strict=True):
            route[seed_of[branch]] = torch.tensor([number, slot, int(flag)], dtype=torch.int32)
        learning.append(None if group.learning is None else _rows(group))
    branches = [branch for group in groups for branch in group.branches]
    return Fused(
        site=site,
        kernels=kernels,
        geometry=geometry,
        groups=groups,
        banks=[group.bank for group in groups],
        kinds=",".join(str(_kind(group.bank)) for group in groups),
        branches=branches,
        seeds=torch.tensor([seed_of[branch] for branch in branches], device=device),
        route=route.to(device),
        alpha=torch.cat([group.alpha for group in groups]),
        learning=learning,
        failures=torch.zeros(len(branches), device=device),
        key=("fused " + ",".join(f"{_kind(g.bank)}×{len(g.branches)}" for g in groups), len(branches), any(g.learns for g in groups)),
    )


def _rows(group: Group) -> Tensor:
    assert group.learning is not None
    mask = torch.zeros(group.bank.capacity, dtype=torch.bool, device=group.slots.device)
    return mask.index_copy(0, group.slots, group.learning)


def _kind(bank: SlotBank) -> str | None:
    blueprint = bank.blueprint
    if blueprint.receptive_field != "chunk" or blueprint.spatial:
        return None
    name = f"mlp_{blueprint.activation}" if isinstance(blueprint, MLP) else blueprint.name
    return name if name in KINDS and tuple(sorted(KINDS[name].order)) == tuple(sorted(bank.stacks)) else None


def _fits(bank: SlotBank, geometry: Geometry) -> bool:
    kind = _kind(bank)
    assert kind is not None
    return fits(geometry.width, geometry.seeds, kind, [bank.stacks[name] for name in KINDS[kind].order])
