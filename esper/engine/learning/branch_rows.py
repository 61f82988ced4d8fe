"""The tensors of branches, a branch a row: parameters, gradients and moments, as the branch optimizer steps them.

On a CPU the rows are those of the branches that learn. On a GPU they are the whole bank's: gathering costs more launches there than
the other slots cost work, and ``learning`` says which rows may move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.blueprints import BlockBank, SlotBank
from esper.blueprints.unique_indices import unique_indices
from esper.engine.learning.muon import MOMENTUM, matrices_of
from esper.errors import UserError
from esper.seeds import Branch, SeedRegistry
from esper.seeds.device_copy import tensor_on


@dataclass(frozen=True)
class BranchLearning:
    """Settings of AdamW (Loshchilov & Hutter 2019) for branches; ``warmup`` in a branch's own steps, ``clip`` 0 is off.

    With ``rule="muon"`` the matrices of a branch learn by Muon (``esper.engine.learning.muon``) with ``momentum``.
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 1
    clip: float = 0.0
    rule: str = "adamw"
    momentum: float = MOMENTUM

    def __post_init__(self) -> None:
        """Refuse a rule that there is not."""
        if self.rule not in ("adamw", "muon"):
            raise UserError(f"BranchLearning(rule='{self.rule}') is not accepted; the rule is adamw or muon.")


class SlotRows:
    """Rows of a slot bank: its own tensors where all its slots are meant, copies to be written back otherwise.

    ``values``, ``gradients``, ``first`` and ``second`` hold a tensor ``[A, …]`` for every kind of parameter. ``warms`` says that the
    rows' rate rises over their own warm-up.
    """

    warms = True

    def __init__(self, bank: SlotBank, branches: list[Branch]) -> None:
        held = [(stack, *bank.moments[name]) for name, stack in bank.stacks.items() if stack.grad is not None]
        slots = [branch.slot for branch in branches]
        self.branches, self._bank = branches, bank
        self._whole = slots == list(range(bank.capacity))
        self._slots = torch.tensor(slots, dtype=torch.int64, device=bank.steps.device)
        self._kept = held
        self.values, self.first, self.second = ([self._rows(row[kind]) for row in held] for kind in range(3))
        self.gradients = [self._rows(stack.grad) for stack, _, _ in held if stack.grad is not None]

    @property
    def matrices(self) -> list[bool]:
        """Whether each kind of parameter is a matrix."""
        return [value.dim() == 3 for value in self.values]

    def count(self) -> Tensor:
        """Count a step of every branch here; float ``[A]``, the steps with this one."""
        if self._whole:
            return self._bank.steps.add_(1)
        with unique_indices(self._slots.device):
            self._bank.steps[self._slots] += 1
        return self._bank.steps[self._slots]

    def without(self, gone: set[int]) -> SlotRows:
        """The rows of all branches but those of the given ids."""
        return SlotRows(self._bank, [branch for branch in self.branches if branch.id not in gone])

    def keep(self) -> None:
        """Write copies back."""
        if not self._whole:
            for number, stepped in enumerate((self.values, self.first, self.second)):
                for row, tensor in zip(self._kept, stepped, strict=True):
                    with unique_indices(tensor.device):
                        row[number].index_copy_(0, self._slots, tensor)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self._whole else tensor.detach().index_select(0, self._slots)


class BankRows:
    """A whole slot bank, in place, of which only the slots of the given branches are ``learning`` (bool ``[capacity]``)."""

    warms = True

    def __init__(self, bank: SlotBank, branches: list[Branch], learning: Tensor) -> None:
        held = [(stack, stack.grad, *bank.moments[name]) for name, stack in bank.stacks.items() if stack.grad is not None]
        self.branches, self.learning, self._bank = branches, learning, bank
        self.places = [branch.slot for branch in branches]
        self.values, self.gradients = [row[0].detach() for row in held], [row[1] for row in held]
        self.first, self.second = [row[2] for row in held], [row[3] for row in held]

    @property
    def matrices(self) -> list[bool]:
        """Whether each kind of parameter is a matrix."""
        return [value.dim() == 3 for value in self.values]

    @property
    def for_kernel(self) -> bool:
        """Whether ``esper.kernels.adamw`` takes these tensors."""
        tensors = [*self.values, *self.gradients]
        return len(self.values) <= 6 and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)

    def step(self, learning: BranchLearning, factor: float) -> Tensor:
        """One launch for all of it; the gradients' norms ``[capacity]``."""
        from esper.kernels.adamw import AdamWSettings, adamw

        rate, (beta1, beta2) = learning.lr * factor, learning.betas
        settings = AdamWSettings(rate, float(learning.warmup), beta1, beta2, learning.eps, learning.weight_decay, learning.clip)
        held = list(zip(self.values, self.gradients, self.first, self.second, strict=True))
        return adamw(held, self.learning, self._bank.steps, settings)

    @staticmethod
    def learning_slots(bank: SlotBank, branches: list[Branch]) -> Tensor:
        """bool ``[capacity]``."""
        mask = [False] * bank.capacity
        for branch in branches:
            mask[branch.slot] = True
        return tensor_on(mask, bank.steps.device)

    def count(self, moving: Tensor) -> Tensor:
        """Count a step of every slot that moves; float ``[capacity]``, the steps with this one."""
        return self._bank.steps.add_(moving)

    def take_back(self, branch: Branch) -> None:
        """Steps on the device were counted for sound gradients alone."""


class BlockRows:
    """One grown block as one row: its own tensors with an axis of length 1 in front."""

    def __init__(self, bank: BlockBank, branch: Branch) -> None:
        self.branches, self._bank, self._key = [branch], bank, str(branch.slot)
        self.places = [0]
        self.warms = bank.blueprint.state == "reset"
        named = [(name, p) for name, p in bank.blocks[self._key].named_parameters() if p.grad is not None]
        moments = [bank.moments[self._key][name] for name, _ in named]
        self._names = [name for name, _ in named]
        self.values = [parameter.detach().unsqueeze(0) for _, parameter in named]
        self.gradients = [parameter.grad.unsqueeze(0) for _, parameter in named if parameter.grad is not None]
        self.first = [first.unsqueeze(0) for first, _ in moments]
        self.second = [second.unsqueeze(0) for _, second in moments]

    @property
    def matrices(self) -> list[bool]:
        """Whether each parameter is a matrix between layers."""
        found = matrices_of(self._bank.blocks[self._key])
        return [name in found for name in self._names]

    @property
    def learning(self) -> Tensor:
        """bool ``[1]``: it does."""
        return torch.ones(1, dtype=torch.bool, device=self.values[0].device)

    def count(self, moving: Tensor | None = None) -> Tensor:
        """Count a step; float ``[1]``, the steps with this one."""
        self._bank.steps[self._key] += 1
        return torch.full((1,), float(self._bank.steps[self._key]), device=self.values[0].device)

    def take_back(self, branch: Branch) -> None:
        """The step just counted was none: the gradient was not finite, as the host has learnt since."""
        if self._key in self._bank.steps:
            self._bank.steps[self._key] -= 1

    def without(self, gone: set[int]) -> None:
        """Nothing is left."""

    def keep(self) -> None:
        """It was stepped in place."""


Rows = SlotRows | BlockRows


def branch_values(registry: SeedRegistry, branch: Branch) -> list[Tensor]:
    """The branch's parameters, detached copies."""
    bank = registry.layers[branch.site].bank(branch.blueprint)
    if isinstance(bank, SlotBank):
        return list(bank.values(branch.slot).values())
    return [value.detach().clone() for value in bank.blocks[str(branch.slot)].parameters()]


def gradient_norms(registry: SeedRegistry, branches: list[Branch]) -> tuple[list[list[int]], list[int], list[Tensor]]:
    """By bank: the branches that have a gradient, the number of their parameters each, and the gradient's L2 norms ``[branches]``."""
    names: list[list[int]] = []
    counts: list[int] = []
    norms: list[Tensor] = []
    for (site, blueprint), group in by_bank(branches).items():
        bank = registry.layers[site].bank(blueprint)
        if isinstance(bank, SlotBank):
            gradients = [stack.grad for stack in bank.stacks.values() if stack.grad is not None]
            if gradients:
                slots = tensor_on([branch.slot for branch in group], bank.steps.device)
                squares = torch.stack([gradient[slots].float().flatten(1).square().sum(1) for gradient in gradients]).sum(0)
                names.append([branch.id for branch in group])
                counts.append(sum(gradient[0].numel() for gradient in gradients))
                norms.append(squares.sqrt())
            continue
        for branch in group:
            gradients = [p.grad for p in bank.blocks[str(branch.slot)].parameters() if p.grad is not None]
            if gradients:
                names.append([branch.id])
                counts.append(sum(gradient.numel() for gradient in gradients))
                norms.append(torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt().view(1))
    return names, counts, norms


def by_bank(branches: list[Branch]) -> dict[tuple[int, str], list[Branch]]:
    """The branches of each (site, blueprint), whose parameters lie in one bank."""
    gathered: dict[tuple[int, str], list[Branch]] = {}
    for branch in branches:
        gathered.setdefault((branch.site, branch.blueprint), []).append(branch)
    return gathered
