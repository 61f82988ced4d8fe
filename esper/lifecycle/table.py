"""Structure of arrays over all seeds of a model: one row a seed, 28 bytes each, kept on the CPU and saved with the model."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.lifecycle.stages import Stage

COLUMNS: dict[str, torch.dtype] = {
    "stage": torch.int8,
    "paused": torch.bool,
    "generation": torch.int16,
    "errors": torch.int32,
    "age": torch.int32,
    "branch": torch.int32,
    "looks": torch.int32,
    "next_look": torch.int32,
    "score": torch.float32,
}


RESTING = frozenset((Stage.DORMANT, Stage.FOSSILIZED))
"""Stages in which a seed does not age."""


class SeedTable:
    """Columns as tensors of shape ``[rows]``; ``branch`` is −1 where nothing grew, ``score`` NaN where nothing was judged.

    ``age`` counts ticks in the stage, but of resting seeds is minus the tick at which they began to rest: ``ages`` reads both.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.columns = {name: torch.zeros(rows, dtype=dtype) for name, dtype in COLUMNS.items()}
        self.columns["branch"].fill_(-1)
        self.columns["score"].fill_(float("nan"))
        self._aging: set[int] = set()
        self._index = torch.zeros(0, dtype=torch.int64)
        self._known = self.columns["stage"]._version

    def __getattr__(self, name: str) -> Tensor:
        columns: dict[str, Tensor] = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        raise AttributeError(name)

    @property
    def bytes_per_seed(self) -> int:
        """Memory of one row, bytes."""
        return sum(column.element_size() for column in self.columns.values())

    def stage_of(self, row: int) -> Stage:
        """The stage of one row."""
        return Stage(int(self.columns["stage"][row]))

    def put(self, row: int, stage: Stage) -> None:
        """Write the stage of one row."""
        aging = self._fresh()
        self.columns["stage"][row] = int(stage)
        self._known = self.columns["stage"]._version
        present = row in aging
        if present == (stage in RESTING):
            (aging.remove if present else aging.add)(row)
            self._index = self._index[:0]

    def aging(self) -> Tensor:
        """Rows ``[n]``, ascending, that are neither DORMANT nor FOSSILIZED: those that a tick must look at.

        A million dormant seeds cost a tick nothing: the whole column is searched only after another writer changed it.
        """
        aging = self._fresh()
        if self._index.numel() != len(aging):
            self._index = torch.tensor(sorted(aging), dtype=torch.int64)
        return self._index

    def _fresh(self) -> set[int]:
        stage = self.columns["stage"]
        if stage._version != self._known:
            self._index = ((stage != int(Stage.DORMANT)) & (stage != int(Stage.FOSSILIZED))).nonzero().flatten()
            self._aging, self._known = set(self._index.tolist()), stage._version
        return self._aging

    def rows_in(self, *stages: Stage) -> list[int]:
        """Rows whose stage is one of ``stages``, ascending."""
        stage = self.columns["stage"]
        if not RESTING & set(stages):
            index = self.aging()
            there = stage[index]
            return [row for row, code in zip(index.tolist(), there.tolist(), strict=True) if code in stages]
        mask = torch.zeros(self.rows, dtype=torch.bool)
        for wanted in stages:
            mask |= stage == int(wanted)
        return mask.nonzero().flatten().tolist()

    def rest(self, row: int, tick: int) -> None:
        """Note the tick at which a seed's rest began. A tick makes no resting seed older, so ``age`` holds minus that tick."""
        self.columns["age"][row] = -tick

    def ages(self, rows: slice, tick: int) -> Tensor:
        """Ticks that these seeds have been in their stages at ``tick``, resting ones too, int32."""
        stage, age = self.columns["stage"][rows], self.columns["age"][rows]
        resting = (stage == int(Stage.DORMANT)) | (stage == int(Stage.FOSSILIZED))
        return torch.where(resting, tick + age, age)

    def counts(self) -> dict[str, int]:
        """Number of seeds in each stage, by stage name."""
        counts = torch.bincount(self.columns["stage"].long(), minlength=len(Stage)).tolist()
        return {stage.name: counts[stage] for stage in Stage}

    def state(self) -> dict[str, Tensor]:
        """A copy of every column."""
        return {name: column.clone() for name, column in self.columns.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same number of rows; raises ValueError otherwise."""
        for name, column in self.columns.items():
            if state[name].shape != column.shape:
                raise ValueError(f"column {name} has {state[name].shape[0]} rows, this table has {self.rows}")
            column.copy_(state[name])
