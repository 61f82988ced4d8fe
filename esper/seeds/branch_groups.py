"""Groups of branches, as tensors that a site's forward adds without looking at single seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BlockBank, Geometry, SlotBank
from esper.seeds.branches import Branch
from esper.seeds.device_copy import tensor_on, to_device


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
    contained: bool = True
    error: Exception | None = None
    """The last exception of the blueprint's code, until the engine has taken it; one that is not ``contained`` is raised."""

    def bank_parameters(self) -> list[nn.Parameter]:
        """The stacked parameters these branches are rows of."""
        return list(self.bank.stacks.values())

    def cost_key(self) -> tuple[str, int, bool]:
        """The key on which the MACs of a forward and backward depend."""
        return self.bank.blueprint.name, len(self.branches), self.learns


@dataclass
class BlockGroup:
    """One grown block; ``alpha`` and ``failures`` have shape ``[1]``.

    ``fork_rng``: the block's own dropout draws from a copy of the RNG, so that the host's masks stay those of the live forward.
    """

    bank: BlockBank
    branches: list[int]
    slot: int
    alpha: Tensor
    learning: bool
    failures: Tensor
    fork_rng: bool = False
    forwards: int = 0
    contained: bool = True
    error: Exception | None = None

    def bank_parameters(self) -> list[nn.Parameter]:
        """The block's own parameters."""
        return self.bank.learning_parameters(self.slot)

    def cost_key(self) -> tuple[str, int, bool]:
        """The key on which the MACs of a forward and backward depend."""
        return self.bank.blueprint.name, 1, self.learning or str(self.slot) in self.bank.tied


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
"""Groups of branches to add, in order: ``Group``, ``BlockGroup``, ``Injection``, or ``FusedGroup``, always first."""


@dataclass(frozen=True)
class GroupMember:
    """A branch to put into a group: its alpha now and whether the task's gradient reaches its parameters."""

    branch: Branch
    alpha: float
    learning: bool


def build(members: list[GroupMember], banks: dict[str, SlotBank | BlockBank], geometry: Geometry, device: torch.device) -> BranchGroups:
    """Group the members of one site by bank; branches on the same chunk (generations) go to different groups."""
    groups: BranchGroups = []
    gathered: dict[tuple[str, int], list[GroupMember]] = {}
    for member in members:
        bank = banks[member.branch.blueprint]
        if isinstance(bank, BlockBank):
            alpha = tensor_on([member.alpha], device)
            groups.append(BlockGroup(bank, [member.branch.id], member.branch.slot, alpha, member.learning, _zeros(1, device)))
            continue
        layer = 0
        while any(other.branch.row == member.branch.row for other in gathered.get((member.branch.blueprint, layer), [])):
            layer += 1
        gathered.setdefault((member.branch.blueprint, layer), []).append(member)
    groups[:0] = [_group(group, banks[name], geometry, device) for (name, _), group in gathered.items()]
    return groups


def _group(members: list[GroupMember], bank: SlotBank | BlockBank, geometry: Geometry, device: torch.device) -> Group:
    assert isinstance(bank, SlotBank)
    seeds = [member.branch.seed for member in members]
    index, mask = geometry.features(seeds)
    padded = not bool(mask.all())
    real = mask.flatten().nonzero().flatten()
    learning = torch.tensor([member.learning for member in members])
    residual = torch.tensor([float(member.branch.residual) for member in members])
    return Group(
        bank=bank,
        branches=[member.branch.id for member in members],
        slots=tensor_on([member.branch.slot for member in members], device),
        index=to_device(index.flatten(), device),
        mask=to_device(mask, device) if padded else None,
        real=to_device(real, device) if padded else None,
        target=to_device(index.flatten()[real], device),
        alpha=tensor_on([member.alpha for member in members], device),
        learning=None if bool(learning.all()) else to_device(learning, device),
        residual=to_device(residual, device) if bool(residual.any()) else None,
        failures=_zeros(len(members), device),
        seeds=tensor_on(seeds, device) if geometry.width % geometry.seeds == 0 else None,
        learns=bool(learning.any()),
    )


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, device=device)
