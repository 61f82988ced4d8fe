"""The table of branches: their blueprints, the slots of their parameters, their α, and their history."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from esper.grafting import STRATEGY_NAMES, initial_state
from esper.grafting.state import widened
from esper.lifecycle import Stage


@dataclass
class Branch:
    """The fixed properties of a branch, and its path; the numbers that change at every tick are columns of the table."""

    id: int
    site: int
    row: int
    seed: int
    blueprint: str
    slot: int
    generation: int
    strategy: str
    parameters: int
    macs: int
    residual: bool = False
    stage: Stage = Stage.GERMINATED
    alive: bool = True
    path: list[tuple[str, int]] = field(default_factory=list)
    gain: float = float("nan")
    bound: float = float("nan")
    unsound: bool = False
    """Whether it gave non-finite values when it last ran (told of fossils, which stay)."""
    overflows: int = 0
    """Steps in a row at which its gradient was not finite under a loss scale."""
    raised: int = 0
    """Ticks at which its code, or the strategy that blends it, raised an exception."""
    replaces: int = -1
    """The branch in whose place it learns or is on trial."""
    held: bool = False
    """Whether another is on trial in its place: nothing of it changes, and no forward adds it."""
    looks: int = 0
    """Looks at the judge set that the trial has cost."""
    objective: str = ""
    """What it learns from in TRAINING; empty: the run's objective."""
    group: int = -1
    """The first of the branches that it is one decision with, itself included; −1: it is judged alone."""

    @property
    def excluded(self) -> bool:
        """Whether no forward adds it, although its stage may say so: it is held, or learns in another's place."""
        return self.held or (self.replaces >= 0 and self.stage is Stage.TRAINING)


class BranchTable:
    """Branches by id. Tensors ``[branches]`` on the CPU: ``alpha``, ``fade_from``, and ``grafting`` ``[branches, state]``."""

    def __init__(self) -> None:
        self.entries: list[Branch] = []
        self.alpha = torch.zeros(0)
        self.fade_from = torch.zeros(0)
        self.grafting = initial_state(0)

    def add(self, branch: Branch) -> Branch:
        """Append a branch; its id is its position."""
        assert branch.id == len(self.entries), "branches are numbered by position"
        assert branch.strategy in STRATEGY_NAMES, branch.strategy
        self.entries.append(branch)
        self.alpha = torch.cat([self.alpha, torch.zeros(1)])
        self.fade_from = torch.cat([self.fade_from, torch.zeros(1)])
        self.grafting = torch.cat([self.grafting, initial_state(1)])
        return branch

    def __getitem__(self, branch: int) -> Branch:
        return self.entries[branch]

    def __len__(self) -> int:
        return len(self.entries)

    def state(self) -> dict[str, Any]:
        """Every branch and the tensors over them, by reference."""
        entries = [asdict(branch) | {"stage": int(branch.stage), "path": [list(step) for step in branch.path]} for branch in self.entries]
        return {"entries": entries, "alpha": self.alpha, "fade_from": self.fade_from, "grafting": self.grafting}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError where the tensors do not fit the branches."""
        entries = [
            Branch(**(saved | {"stage": Stage(saved["stage"]), "path": [(str(name), int(tick)) for name, tick in saved["path"]]}))
            for saved in state["entries"]
        ]
        count, grafting = len(entries), widened(state["grafting"])
        expected = ((count,), (count,), tuple(initial_state(count).shape))
        if tuple(tuple(column.shape) for column in (state["alpha"], state["fade_from"], grafting)) != expected:
            raise ValueError("the table of branches and its columns are of different lengths")
        if [branch.id for branch in entries] != list(range(count)):
            raise ValueError("branches are not numbered by position")
        self.entries = entries
        self.alpha, self.fade_from, self.grafting = state["alpha"], state["fade_from"], grafting

    def living(self) -> list[Branch]:
        """Branches whose parameters exist."""
        return [branch for branch in self.entries if branch.alive]
