"""Slot banks: the stacked parameters of all branches that grew from one blueprint at one site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.blueprints.base import Blueprint, Parameters
from esper.blueprints.geometry import Geometry
from esper.blueprints.unique_indices import select_slots


class SlotBank(nn.Module):
    """Parameters of shape ``[capacity, …]``; memory exists only once something germinated, and doubles when full.

    Every row carries its own AdamW moments and step count (``moments``, ``steps``), so that a frozen, free or newborn slot
    is never moved by another's history. Rows of uneven chunks are padded with zeros, which get no gradient.
    """

    def __init__(self, blueprint: Blueprint, geometry: Geometry, device: torch.device) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.geometry = geometry
        self.capacity = 0
        self.used: list[bool] = []
        self.stacks = nn.ParameterDict()
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = torch.zeros(0, device=device)
        self.source: Any = None
        """What hears another activation that its branches read, where they do not read the site's (``esper.seeds.hidden_layers``)."""
        self._device = device

    def allocate(self, seed: int, generator: torch.Generator, silent: bool) -> int:
        """Start values into a free slot; returns the slot. Doubles the bank when none is free."""
        if all(self.used):
            self._double()
        slot = self.used.index(False)
        start, end = self.geometry.bounds(seed)
        reads = self.blueprint.reads(self.geometry, end - start)
        values = self.blueprint.initialise(reads, end - start, self.geometry, generator, silent)
        with torch.no_grad():
            for name, value in values.items():
                self.stacks[name][slot].copy_(_padded(value, self.stacks[name].shape[1:]))
        self._forget(slot)
        self.used[slot] = True
        return slot

    def reserve(self, slots: int) -> None:
        """Room for that many slots at least."""
        while self.capacity < slots:
            self._double()

    def free(self, slot: int) -> None:
        """Give a slot back; its parameters, gradients and moments become zero."""
        with torch.no_grad():
            for stack in self.stacks.values():
                stack[slot].zero_()
        self._forget(slot)
        self.used[slot] = False

    def gather(self, slots: Tensor, learning: Tensor | None, dtype: torch.dtype) -> Parameters:
        """Rows of the given slots in ``dtype``; where ``learning`` (bool ``[A]``) is False no gradient flows to them."""
        rows: Parameters = {}
        for name, stack in self.stacks.items():
            row = select_slots(stack, slots)
            if learning is not None:
                row = torch.where(learning.view(-1, *([1] * (row.dim() - 1))), row, row.detach())
            rows[name] = row.to(dtype)
        return rows

    def values(self, slot: int) -> Parameters:
        """One slot's parameters without padding, detached copies (export, saving a branch)."""
        return {name: stack.detach()[slot].clone() for name, stack in self.stacks.items()}

    def scale_gradient(self, slot: int, factor: float) -> None:
        """Multiply one slot's gradients (undoing a loss scale)."""
        for stack in self.stacks.values():
            if stack.grad is not None:
                stack.grad[slot] *= factor

    def state(self) -> dict[str, Any]:
        """All slots with their moments and steps, by reference."""
        stacks = {name: stack.detach() for name, stack in self.stacks.items()}
        moments = {name: list(pair) for name, pair in self.moments.items()}
        return {"used": list(self.used), "steps": self.steps, "stacks": stacks, "moments": moments}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError where its shapes are not this bank's."""
        used, shapes = [bool(value) for value in state["used"]], self._slot_shapes() if state["used"] else {}
        for name, shape in shapes.items():
            held = [state["stacks"][name], *state["moments"][name]]
            if len(held) != 3 or any(tuple(tensor.shape) != (len(used), *shape) for tensor in held):
                raise ValueError(f"the saved parameter '{name}' of {self.blueprint.name} has another shape")
        if tuple(state["steps"].shape) != (len(used),):
            raise ValueError(f"the saved steps of {self.blueprint.name} have another shape")
        device = self._device
        self.used, self.capacity, self.steps = used, len(used), state["steps"].to(device)
        self.stacks = nn.ParameterDict()
        for name in sorted(shapes, key=list(state["stacks"]).index):  # in the order saved: sums run in this order
            self.stacks[name] = nn.Parameter(state["stacks"][name].to(device))
        self.moments = {name: (state["moments"][name][0].to(device), state["moments"][name][1].to(device)) for name in shapes}

    def _double(self) -> None:
        """Twice the capacity; values, gradients, moments and steps stay. Nothing changes before all memory is there."""
        more = max(1, self.capacity)
        stacks: dict[str, nn.Parameter] = {}
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, shape in self._slot_shapes().items():
            added = torch.zeros(more, *shape, device=self._device)
            old = self.stacks[name] if self.capacity else added[:0]
            stack = nn.Parameter(torch.cat([old.detach(), added]))
            if old.grad is not None:
                stack.grad = torch.cat([old.grad, torch.zeros_like(added)])
            stacks[name] = stack
            first, second = self.moments.get(name, (added[:0], added[:0]))
            moments[name] = (torch.cat([first, added]), torch.cat([second, added]))
        steps = torch.cat([self.steps, torch.zeros(more, device=self._device)])
        self.stacks.update(stacks)
        self.moments, self.steps = moments, steps
        self.used += [False] * more
        self.capacity += more

    def _slot_shapes(self) -> dict[str, tuple[int, ...]]:
        widest = self.geometry.chunk
        return self.blueprint.shapes(self.blueprint.reads(self.geometry, widest), widest, self.geometry)

    def _forget(self, slot: int) -> None:
        self.steps[slot] = 0.0
        for name, (first, second) in self.moments.items():
            first[slot].zero_()
            second[slot].zero_()
            gradient = self.stacks[name].grad
            if gradient is not None:
                gradient[slot].zero_()


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    missing = [(0, full - given) for given, full in zip(value.shape, shape, strict=True)]
    return functional.pad(value, [side for pair in reversed(missing) for side in pair])
