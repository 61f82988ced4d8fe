"""Taking back a command that failed halfway: everything that carrying it out may have changed, as it was before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.blueprints import BlockBank, SlotBank
from esper.seeds import Branch, Garden
from esper.training.life import Life


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

    def __init__(self, life: Life, rows: list[int]) -> None:
        garden = life.garden
        self.life = life
        self._rows = torch.tensor(sorted(set(rows)), dtype=torch.int64)
        self._table = {name: column[self._rows] for name, column in garden.table.columns.items()}
        self._history = garden.history.copy(rows)
        self._branches = [_Mutable.of(branch) for branch in garden.branches.entries]
        self._numbers = {name: getattr(garden.branches, name).clone() for name in ("alpha", "fade_from", "grafting")}
        self._slots = [_slots(garden, number) for number in range(len(garden.sites))]
        self._released = list(garden.released)
        self._counts, self._leaving = dict(life.counts), list(life.leaving)
        self._readiness, self._failed = dict(life.objective.readiness), set(life.objective.failed)

    def restore(self) -> None:
        """Put everything back; what was allocated since is freed."""
        life, garden = self.life, self.life.garden
        for name, column in self._table.items():
            garden.table.columns[name][self._rows] = column
        del garden.branches.entries[len(self._branches) :]
        for branch, was in zip(garden.branches.entries, self._branches, strict=True):
            was.put_back(branch)
        garden.history.put_back(self._history)
        for name, value in self._numbers.items():
            setattr(garden.branches, name, value)
        for number, before in enumerate(self._slots):
            _free_new(garden, number, before)
            garden.touch(number)
        garden.released = self._released
        life.counts, life.leaving = self._counts, self._leaving
        life.objective.readiness, life.objective.failed = self._readiness, self._failed


def _slots(garden: Garden, number: int) -> dict[str, set[int]]:
    return {name: _used(bank) for name, bank in garden.banks(number).items()}


def _used(bank: SlotBank | BlockBank) -> set[int]:
    if isinstance(bank, BlockBank):
        return {int(key) for key in bank.blocks}
    return {slot for slot, used in enumerate(bank.used) if used}


def _free_new(garden: Garden, number: int, before: dict[str, set[int]]) -> None:
    banks: nn.ModuleDict = garden.layers[number].banks
    for name, bank in garden.banks(number).items():
        if name not in before:
            del banks[name]
            continue
        for slot in _used(bank) - before[name]:
            bank.free(slot)
