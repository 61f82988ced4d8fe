"""Taking back a command that failed halfway: everything that carrying it out may have changed, as it was before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.blueprints import BlockBank, SlotBank
from esper.engine.transitions import Transitions
from esper.seeds import Branch, SeedRegistry


@dataclass(frozen=True)
class _Mutable:
    stage: Any
    alive: bool
    path: int
    gain: float
    bound: float
    strategy: str
    replaces: int
    held: bool
    looks: int

    @classmethod
    def of(cls, branch: Branch) -> _Mutable:
        values = {name: getattr(branch, name) for name in cls.__dataclass_fields__}
        return cls(**values | {"path": len(branch.path)})

    def put_back(self, branch: Branch) -> None:
        for name in self.__dataclass_fields__.keys() - {"path"}:
            setattr(branch, name, getattr(self, name))
        del branch.path[self.path :]


class Before:
    """The state of seeds and branches before a command; slots are freed and hosts returned only after it, so they need no copy.

    ``rows`` are the seeds that the command moves: of the others nothing changes.
    """

    def __init__(self, transitions: Transitions, rows: list[int]) -> None:
        registry = transitions.registry
        self.transitions = transitions
        self._rows = torch.tensor(sorted(set(rows)), dtype=torch.int64)
        self._table = {name: column[self._rows] for name, column in registry.table.columns.items()}
        self._history = registry.history.copy(rows)
        self._branches = [_Mutable.of(branch) for branch in registry.branches.entries]
        self._numbers = {name: getattr(registry.branches, name).clone() for name in ("alpha", "fade_from", "grafting")}
        self._slots = [_slots(registry, number) for number in range(len(registry.sites))]
        self._released = list(registry.released)
        self._counts, self._leaving = dict(transitions.counts), list(transitions.leaving)
        self._readiness, self._failed = dict(transitions.objective.readiness), set(transitions.objective.failed)

    def restore(self) -> None:
        """Put everything back; what was allocated since is freed."""
        transitions, registry = self.transitions, self.transitions.registry
        for name, column in self._table.items():
            registry.table.columns[name][self._rows] = column
        del registry.branches.entries[len(self._branches) :]
        for branch, was in zip(registry.branches.entries, self._branches, strict=True):
            was.put_back(branch)
        registry.history.put_back(self._history)
        for name, value in self._numbers.items():
            setattr(registry.branches, name, value)
        for number, before in enumerate(self._slots):
            _free_new(registry, number, before)
            registry.mark_changed(number)
        registry.released = self._released
        transitions.counts, transitions.leaving = self._counts, self._leaving
        transitions.objective.readiness, transitions.objective.failed = self._readiness, self._failed


def _slots(registry: SeedRegistry, number: int) -> dict[str, set[int]]:
    return {name: _used(bank) for name, bank in registry.banks(number).items()}


def _used(bank: SlotBank | BlockBank) -> set[int]:
    if isinstance(bank, BlockBank):
        return {int(key) for key in bank.blocks}
    return {slot for slot, used in enumerate(bank.used) if used}


def _free_new(registry: SeedRegistry, number: int, before: dict[str, set[int]]) -> None:
    banks: nn.ModuleDict = registry.layers[number].banks
    for name, bank in registry.banks(number).items():
        if name not in before:
            del banks[name]
            continue
        for slot in _used(bank) - before[name]:
            bank.free(slot)
