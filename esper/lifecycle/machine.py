"""The state machine: the transitions that are allowed now, their changes to the table, and the seeds that have outlived a stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esper.lifecycle.ages import TIMEOUT, Ages
from esper.lifecycle.stages import Stage
from esper.lifecycle.table import SeedTable
from esper.lifecycle.transitions import NO_MINIMUM_AGE, refusal


@dataclass(frozen=True)
class Change:
    """One transition that happened, with its cause in words."""

    row: int
    source: Stage
    target: Stage
    cause: str


class Rules:
    """Which transitions are allowed now, over a SeedTable; measures nothing and touches no module."""

    def __init__(self, table: SeedTable, ages: Ages, reseed: bool = False, training_slots: int = 8) -> None:
        self.table = table
        self.ages = ages
        self.reseed = reseed
        self.training_slots = training_slots

    def stage_of(self, row: int) -> Stage:
        """The stage of one row."""
        return self.table.stage_of(row)

    def age_of(self, row: int) -> int:
        """Ticks that a row has been in its stage."""
        return int(self.table.age[row])

    def rows_in(self, *stages: Stage) -> list[int]:
        """Rows whose stage is one of ``stages``, ascending."""
        return self.table.rows_in(*stages)

    def refusal(self, row: int, target: Stage) -> str | None:
        """Why this row may not move to ``target`` now (table, age, slots), or None; gates are asked separately."""
        if not 0 <= row < self.table.rows:
            return f"there is no seed row {row}; rows are 0 to {self.table.rows - 1}"
        source = self.stage_of(row)
        reason = refusal(source, target, self.reseed)
        if reason is not None:
            return reason
        age, least = self.age_of(row), self.ages.minimum.get(source, 0)
        if target is Stage.DORMANT:
            least = self.ages.maximum[source]
        if target not in NO_MINIMUM_AGE and source not in (Stage.DORMANT, Stage.FOSSILIZED) and age < least:
            return f"{source.name} is {age} ticks old and lasts at least {least}"
        if target is Stage.TRAINING and len(self.rows_in(Stage.TRAINING)) >= self.training_slots:
            return f"all {self.training_slots} training slots are taken"
        return None

    def _change(self, row: int, target: Stage, cause: str) -> Change:
        source = self.stage_of(row)
        reason = refusal(source, target, self.reseed)
        if reason is not None:
            raise ValueError(reason)
        return Change(row, source, target, cause)


class Machine(Rules):
    """Makes transitions, in the table alone, and lets seeds grow older."""

    def __init__(self, table: SeedTable, ages: Ages, reseed: bool = False, training_slots: int = 8) -> None:
        super().__init__(table, ages, reseed, training_slots)
        self._limits = torch.full((len(Stage),), torch.iinfo(torch.int64).max)
        for stage in TIMEOUT:
            self._limits[stage] = ages.maximum[stage]

    def apply(self, row: int, target: Stage, cause: str) -> Change:
        """Make the transition; raises ValueError where ``refusal`` would have said no by the table of transitions."""
        change, table = self._change(row, target, cause), self.table
        table.put(row, target)
        table.age[row] = 0
        table.paused[row] = False
        if target is Stage.GERMINATED:
            table.generation[row] += 1
            table.looks[row] = table.errors[row] = 0
            table.score[row] = float("nan")
        if target in (Stage.EVALUATING, Stage.FINE_TUNING):
            table.next_look[row] = self.ages.minimum[target]
        if target is Stage.DORMANT:
            table.branch[row] = -1
        return change

    def advance(self) -> None:
        """One tick older: every seed that is neither DORMANT nor FOSSILIZED."""
        rows = self.table.aging()
        if rows.numel():
            self.table.age[rows] += 1

    def outlived(self) -> list[tuple[int, Stage]]:
        """(row, target) of every seed at its stage's maximum age, ascending by row."""
        rows = self.table.aging()
        if not rows.numel():
            return []
        stages = self.table.stage[rows].long()
        late = self.table.age[rows] >= self._limits[stages]
        return [(row, TIMEOUT[Stage(stage)]) for row, stage in zip(rows[late].tolist(), stages[late].tolist(), strict=True)]

    def trial(self) -> Trial:
        """The stages that seeds would have after some transitions, without moving any."""
        return Trial(self)


class Trial(Rules):
    """A dry run of transitions over a machine's table, which remembers the rows that would have moved."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.table, machine.ages, machine.reseed, machine.training_slots)
        self._moved: dict[int, Stage] = {}

    def stage_of(self, row: int) -> Stage:
        """The stage of one row, its last transition here counted."""
        moved = self._moved.get(row)
        return super().stage_of(row) if moved is None else moved

    def age_of(self, row: int) -> int:
        """Ticks in the stage: none for a row that moved here."""
        return 0 if row in self._moved else super().age_of(row)

    def rows_in(self, *stages: Stage) -> list[int]:
        """Rows whose stage is now one of ``stages``, ascending."""
        if not self._moved:
            return super().rows_in(*stages)
        there = set(super().rows_in(*stages)) - self._moved.keys()
        return sorted(there | {row for row, stage in self._moved.items() if stage in stages})

    def apply(self, row: int, target: Stage, cause: str) -> Change:
        """Take the transition as made; raises ValueError where the table of transitions has none."""
        change = self._change(row, target, cause)
        self._moved[row] = target
        return change
