"""Groups of branches: what a site's forward adds, as tensors that the forward can use without looking at single seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BlockBank, Geometry, SlotBank
from esper.seeds.branches import Branch
from esper.seeds.device_copy import made_on, on_device


@dataclass
class Group:
    """``A`` branches of one bank with disjoint chunks of width ``C``.

    ``index`` ``[A·C]`` are the features read and written; ``mask`` ``[A, C]`` and ``real`` (positions in ``[0, A·C)``) are
    None where no chunk is padded; ``learning`` bool ``[A]`` is None where all learn; ``residual`` float ``[A]`` marks branches
    ``δ = b − id``; ``failures`` ``[A]`` counts forwards with a non-finite δ. ``seeds`` ``[A]`` are the chunks' numbers where all
    chunks of the site are equally wide, else None: a chunk is then one slice, and not ``C`` features to be found.
    """

    bank: SlotBank
    branches: list[int]
    slots: Tensor
    index: Tensor
    mask: Tensor | None
    real: Tensor | None
    target: Tensor
    alpha: Tensor
    learning: Tensor | None
    residual: Tensor | None
    failures: Tensor
    seeds: Tensor | None = None
    learns: bool = True
    forwards: int = 0
    error: Exception | None = None
    """What the blueprint's code raised last, until the engine has taken note."""

    def bank_parameters(self) -> list[nn.Parameter]:
        """The stacked parameters these branches are rows of."""
        return list(self.bank.stacks.values())

    def cost_key(self) -> tuple[str, int, bool]:
        """What decides the MACs of a forward and backward."""
        return self.bank.blueprint.name, len(self.branches), self.learns


@dataclass
class BlockGroup:
    """One grown block; ``alpha`` and ``failures`` have shape ``[1]``.

    ``aside``: the block's own dropout draws from a copy of the RNG, so that the host's masks stay those of the live forward.
    """

    bank: BlockBank
    branches: list[int]
    slot: int
    alpha: Tensor
    learning: bool
    failures: Tensor
    aside: bool = False
    forwards: int = 0
    error: Exception | None = None

    def bank_parameters(self) -> list[nn.Parameter]:
        """The block's parameters."""
        return list(self.bank.blocks[str(self.slot)].parameters())

    def cost_key(self) -> tuple[str, int, bool]:
        """What decides the MACs of a forward and backward."""
        return self.bank.blueprint.name, 1, self.learning


@dataclass
class Injection:
    """A tensor added to the features ``target`` along ``dim``: the line search's trial step."""

    dim: int
    target: Tensor
    addition: Tensor

    def cost_key(self) -> tuple[str, int, bool]:
        """Adding costs no MACs."""
        return "injection", 0, False


BranchGroups = list[Any]
"""Groups of branches to add, in order: ``Group``, ``BlockGroup``, ``Injection``, or ``esper.seeds.fused.Fused``, always first."""


@dataclass(frozen=True)
class Part:
    """A branch to put into a group: its alpha now and whether the task's gradient reaches its parameters."""

    branch: Branch
    alpha: float
    learning: bool


def build(parts: list[Part], banks: dict[str, SlotBank | BlockBank], geometry: Geometry, device: torch.device) -> BranchGroups:
    """Group the parts of one site by bank; branches on the same chunk (generations) go to groups of their own."""
    groups: BranchGroups = []
    gathered: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        bank = banks[part.branch.blueprint]
        if isinstance(bank, BlockBank):
            alpha = made_on([part.alpha], device)
            groups.append(BlockGroup(bank, [part.branch.id], part.branch.slot, alpha, part.learning, _zeros(1, device)))
            continue
        layer = 0
        while any(other.branch.row == part.branch.row for other in gathered.get((part.branch.blueprint, layer), [])):
            layer += 1
        gathered.setdefault((part.branch.blueprint, layer), []).append(part)
    groups[:0] = [_group(group, banks[name], geometry, device) for (name, _), group in gathered.items()]
    return groups


def _group(parts: list[Part], bank: SlotBank | BlockBank, geometry: Geometry, device: torch.device) -> Group:
    assert isinstance(bank, SlotBank)
    seeds = [part.branch.seed for part in parts]
    index, mask = geometry.features(seeds)
    padded = not bool(mask.all())
    real = mask.flatten().nonzero().flatten()
    learning = torch.tensor([part.learning for part in parts])
    residual = torch.tensor([float(part.branch.residual) for part in parts])
    return Group(
        bank=bank,
        branches=[part.branch.id for part in parts],
        slots=made_on([part.branch.slot for part in parts], device),
        index=on_device(index.flatten(), device),
        mask=on_device(mask, device) if padded else None,
        real=on_device(real, device) if padded else None,
        target=on_device(index.flatten()[real], device),
        alpha=made_on([part.alpha for part in parts], device),
        learning=None if bool(learning.all()) else on_device(learning, device),
        residual=on_device(residual, device) if bool(residual.any()) else None,
        failures=_zeros(len(parts), device),
        seeds=made_on(seeds, device) if geometry.width % geometry.seeds == 0 else None,
        learns=bool(learning.any()),
    )


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, device=device)
