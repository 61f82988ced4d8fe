"""Runs of two arms that are not paired: no number says which run of the one belongs to which of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.runs import NOWHERE, POOLED, Run, Seed, by_seed, in_order
from esper.compare.statistics.group_power import runs_needed
from esper.compare.statistics.permutation import (
    Sizes,
    group_difference,
    group_equivalence,
    group_equivalence_interval,
    group_interval,
    permutation,
    superiority,
)
from esper.compare.statistics.power import PairsNeeded
from esper.compare.statistics.sign_flip import FLIPS
from esper.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """The values of both arms, signed so that larger is better: for every block the arm's and the reference's, shapes ``[runs]``.

    A failed run counts as worse than every finished run of both arms: by the largest difference between two of these, and at least
    by the minimum effect. That treats both arms alike, so the permutation test stays exact. ``finished`` marks the arm's runs that
    finished, over all blocks; ``lost`` says whether any run failed.
    """

    arm: str
    reference: str
    block: str
    seeds: tuple[Seed, ...]
    values: tuple[tuple[Array, Array], ...]
    finished: NDArray[np.bool_]
    lost: bool
    difference_finished: float

    @property
    def sizes(self) -> Sizes:
        """Runs of both arms in every block."""
        return tuple((len(ours), len(theirs)) for ours, theirs in self.values)

    @property
    def data(self) -> Array:
        """All values, the arm's of a block before the reference's."""
        return np.concatenate([side for one in self.values for side in one])

    @property
    def size(self) -> int:
        """How many runs the test exchanges."""
        return len(self.data)

    @property
    def counts(self) -> tuple[int, int]:
        """Runs of either arm that are judged, over all blocks."""
        return sum(one[0] for one in self.sizes), sum(one[1] for one in self.sizes)

    @property
    def difference(self) -> float:
        """The difference of the means, failed runs counted."""
        return float(group_difference(self.data, self.sizes))

    @property
    def points(self) -> tuple[float, ...]:
        """For every run of the arm, its difference to the reference's mean in its block."""
        return tuple(float(value - theirs.mean()) for ours, theirs in self.values for value in ours)

    @property
    def probability(self) -> float:
        """The chance that a run of the arm is better than one of the reference."""
        return superiority(list(self.values))

    def p_difference(self, flips: int = FLIPS) -> float:
        """P-value of "the arms are alike"."""
        return float(permutation(self.data, self.sizes, flips=flips))

    def p_equivalence(self, margin: float, flips: int = FLIPS) -> float:
        """P-value of "the means differ by ``margin`` or more"; 1 where a run failed, which is worse than any value."""
        return 1.0 if self.lost else float(group_equivalence(self.data, self.sizes, margin, flips=flips))

    def interval(self, alpha: float) -> tuple[float, float]:
        """The differences that the test at ``alpha`` does not reject."""
        return group_interval(self.data, self.sizes, alpha)

    def equivalence_interval(self, alpha: float) -> tuple[float, float]:
        """Those that neither one-sided test rejects; NaN where a failed run keeps the arms from being equivalent."""
        return NOWHERE if self.lost else group_equivalence_interval(self.data, self.sizes, alpha)

    def needs(self, minimum_effect: float, power: float, alpha: float, comparisons: int, looks: int) -> PairsNeeded:
        """How many more runs of each arm would decide; nothing looks early at runs that are not paired."""
        assert not looks
        return runs_needed(list(self.values), self.difference, minimum_effect, power, alpha, comparisons)


def group(runs: Sequence[Run], arm: str, reference: str, block: str, sign: float, minimum_effect: float) -> Groups:
    """Two arms in one block.

    Raises:
        UserError: one of them has no run there, or none of either finished.
    """
    sides = [by_seed(runs, name, block) for name in (arm, reference)]
    for name, side in zip((arm, reference), sides, strict=True):
        if not side:
            where = f" in block {block}" if block else ""
            raise UserError(f"{name!r} has no run{where}, so there is nothing to judge; run it, or leave it out with a filter.")
    ours, theirs = ([side[seed] for seed in in_order(side)] for side in sides)
    good = np.array([sign * run.value for run in (*ours, *theirs) if not run.failed])
    worst = float(good.min()) - (max(float(np.ptp(good)), minimum_effect) or 1.0) if len(good) else 0.0
    values = tuple(np.array([worst if run.failed else sign * run.value for run in side]) for side in (ours, theirs))
    kept = [np.array([sign * run.value for run in side if not run.failed]) for side in (ours, theirs)]
    return Groups(
        arm=arm,
        reference=reference,
        block=block,
        seeds=tuple(in_order(sides[0])),
        values=((values[0], values[1]),),
        finished=np.array([not run.failed for run in ours]),
        lost=any(run.failed for run in (*ours, *theirs)),
        difference_finished=float(kept[0].mean() - kept[1].mean()) if all(map(len, kept)) else float("nan"),
    )


def pool_groups(blocks: Sequence[Groups]) -> Groups:
    """The same arms over several blocks; the runs of a block are exchanged among themselves."""
    return Groups(
        arm=blocks[0].arm,
        reference=blocks[0].reference,
        block=POOLED,
        seeds=tuple(seed for one in blocks for seed in one.seeds),
        values=tuple(pair for one in blocks for pair in one.values),
        finished=np.concatenate([one.finished for one in blocks]),
        lost=any(one.lost for one in blocks),
        difference_finished=float(np.mean([one.difference_finished for one in blocks])),
    )
