"""The finished and failed runs of a sweep as plain data, and how they pair up by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.estimates import probability_of_improvement
from esper.compare.statistics.power import PairsNeeded, pairs_needed
from esper.compare.statistics.sign_flip import FLIPS, equivalence, equivalence_interval, interval, rounding, sign_flip
from esper.errors import UserError
from esper.running.control_runs import CONTROLS

Array = NDArray[np.float64]
Seed = int | str  # what pairs the runs: esper's seeds are numbers, another program may have named its folds
NOWHERE = (float("nan"), float("nan"))
POOLED = "pooled"
GROWTH = {"germinations": "germinated", "fossils": "fossilized", "culls": "culled"}


@dataclass(frozen=True)
class Run:
    """One job of a sweep. ``value`` is the metric as the task reports it, NaN where the run gave none.

    ``costs`` (macs, seconds, parameters) and ``growth`` (germinations, fossils, culls) are those that the run reported, ``alone`` the
    metric of its controls (``same_steps``, ``same_macs``) where it trained any.
    """

    arm: str
    seed: Seed
    value: float
    block: str = ""
    status: str = "FINISHED"
    costs: dict[str, float] = field(default_factory=dict)
    growth: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    id: str = ""

    @property
    def failed(self) -> bool:
        """A run that did not finish, or finished without a finite metric."""
        return self.status != "FINISHED" or not math.isfinite(self.value)


@dataclass(frozen=True)
class Pairs:
    """Differences of one arm to another by seed, positive where the first is better; shapes ``[pairs]``.

    ``tested`` holds a number for every pair: one with a failed run counts as the largest difference seen (at least
    the minimum effect, and 1 where both are 0) against the arm that failed, and as 0 where both failed. Swapping the
    arms' names flips its signs, so the sign-flip test stays exact. ``finished`` marks the pairs in which both runs
    finished, ``lost`` those that one arm alone failed in; ``error`` is how far rounding may have moved each difference.
    """

    arm: str
    reference: str
    block: str
    seeds: tuple[Seed, ...]
    tested: Array
    finished: NDArray[np.bool_]
    lost: NDArray[np.bool_]
    error: Array

    @property
    def size(self) -> int:
        """How many signs the test flips."""
        return len(self.seeds)

    @property
    def counts(self) -> tuple[int, int]:
        """Runs of either arm that are judged."""
        return len(self.seeds), len(self.seeds)

    @property
    def difference(self) -> float:
        """The mean difference, failed runs counted."""
        return float(self.tested.mean())

    @property
    def difference_finished(self) -> float:
        """That of the pairs in which both runs finished; NaN where there is none."""
        kept = self.tested[self.finished]
        return float(kept.mean()) if len(kept) else float("nan")

    @property
    def points(self) -> tuple[float, ...]:
        """A number for every pair."""
        return tuple(self.tested.tolist())

    @property
    def probability(self) -> float:
        """The share of pairs in which the arm is better."""
        return probability_of_improvement(self.tested, self.error)

    def p_difference(self, flips: int = FLIPS) -> float:
        """P-value of "the arms are alike"."""
        return float(sign_flip(self.tested, error=self.error, flips=flips))

    def p_equivalence(self, margin: float, flips: int = FLIPS) -> float:
        """P-value of "the arms differ by ``margin`` or more", by TOST over the pairs in which both runs finished.

        1 as soon as one arm alone failed in a pair. A failed run has no metric that could be shown to be near the other's:
        it is worse than any value, as in worst-rank analysis (Lachin 1999, Controlled Clinical Trials 20:408) and the
        composite strategy of ICH E9(R1), so its pair lies outside every margin. With such losses growing without bound the
        larger of the two one-sided p-values stays at 1/4 or above, however many other pairs there are. Pairs in which both
        runs failed show nothing and are left out here.
        """
        if self.lost.any():
            return 1.0
        return float(equivalence(self.tested[self.finished], margin, error=self.error[self.finished], flips=flips))

    def interval(self, alpha: float) -> tuple[float, float]:
        """The differences that the test at ``alpha`` does not reject."""
        return interval(self.tested, alpha, self.error)

    def equivalence_interval(self, alpha: float) -> tuple[float, float]:
        """Those that neither one-sided test rejects; NaN where a failed run keeps the arms from being equivalent."""
        if self.lost.any() or not self.finished.any():
            return NOWHERE
        return equivalence_interval(self.tested[self.finished], alpha, self.error[self.finished])

    def needs(self, minimum_effect: float, power: float, alpha: float, comparisons: int, looks: int) -> PairsNeeded:
        """How many more pairs would decide."""
        return pairs_needed(self.tested, self.error, minimum_effect, power, alpha, comparisons, looks)


def in_order(seeds: Iterable[Seed]) -> list[Seed]:
    """Sorted: numbers by size, names by letters."""
    return sorted(seeds, key=lambda seed: (isinstance(seed, str), seed))


def by_seed(runs: Sequence[Run], arm: str, block: str) -> dict[Seed, Run]:
    """The runs of one arm in one block by their seed.

    Raises:
        UserError: two runs claim the same arm, block and seed.
    """
    found: dict[Seed, Run] = {}
    for run in runs:
        if (run.arm, run.block) != (arm, block):
            continue
        if run.seed in found:
            raise UserError(
                f"Arm {arm!r} has two runs with seed {run.seed} ({found[run.seed].id}, {run.id}); "
                "delete one, or judge them apart: one sweep at a time, or a filter."
            )
        found[run.seed] = run
    return found


def pair(runs: Sequence[Run], arm: str, reference: str, block: str, sign: float, minimum_effect: float) -> Pairs:
    """Pair two arms by the seeds that both have run.

    Raises:
        UserError: no seed was run by both.
    """
    ours, theirs = by_seed(runs, arm, block), by_seed(runs, reference, block)
    seeds = tuple(in_order(ours.keys() & theirs.keys()))
    if not seeds:
        where = f" in block {block}" if block else ""
        raise UserError(
            f"{arm!r} (seeds {in_order(ours)}) and {reference!r} (seeds {in_order(theirs)}) share no seed{where}; "
            "pairs need the same seeds in both arms: run the missing ones."
        )
    failed = np.array([[ours[s].failed, theirs[s].failed] for s in seeds])
    finished: NDArray[np.bool_] = np.logical_not(failed.any(axis=1))
    raw = np.array([sign * (ours[s].value - theirs[s].value) if ok else 0.0 for s, ok in zip(seeds, finished, strict=True)])
    worst = max(float(np.abs(raw).max()), minimum_effect) or 1.0  # the test asks for signs alone where nothing gives a scale
    tested = raw + worst * (failed[:, 1].astype(float) - failed[:, 0].astype(float))
    values = [[side[s].value if ok else worst for s, ok in zip(seeds, finished, strict=True)] for side in (ours, theirs)]
    error = rounding(*map(np.array, values))
    return Pairs(arm, reference, block, seeds, tested, finished, failed[:, 0] != failed[:, 1], error)


def pool(blocks: Sequence[Pairs]) -> Pairs | None:
    """The mean difference over the blocks for every seed that all blocks have; None where there is no such seed.

    One number a seed, not one a block: runs of one seed may resemble each other across blocks.
    """
    shared = in_order(set.intersection(*(set(p.seeds) for p in blocks)))
    if not shared:
        return None
    rows = [[p.seeds.index(s) for s in shared] for p in blocks]
    tested = np.mean([p.tested[row] for p, row in zip(blocks, rows, strict=True)], axis=0)
    finished = np.all([p.finished[row] for p, row in zip(blocks, rows, strict=True)], axis=0)
    lost = np.any([p.lost[row] for p, row in zip(blocks, rows, strict=True)], axis=0)
    error = np.mean([p.error[row] for p, row in zip(blocks, rows, strict=True)], axis=0) + rounding(tested)
    return Pairs(blocks[0].arm, blocks[0].reference, POOLED, tuple(shared), tested, finished, lost, error)


def costs_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """MACs, seconds and parameters from a run's summary, where it has them."""
    found = {
        "macs": summary.get("macs"),
        "seconds": (summary.get("seconds") or {}).get("total"),
        "parameters": (summary.get("parameters") or {}).get("after"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def run_of_summary(summary: Mapping[str, Any], metric: str, arm: str, block: str, seed: Seed, id: str) -> Run:
    """A job's ``summary.json`` as a run; its value is the metric on the test set, NaN where it is missing."""
    final = (summary.get("metrics") or {}).get("final") or {}
    value = final.get(f"test/{metric}", final.get(metric))
    counts = summary.get("seeds") or {}
    return Run(
        arm=arm,
        block=block,
        seed=seed,
        value=float("nan") if value is None else float(value),
        status=str(summary.get("status", "FAILED")),
        costs=costs_of(summary),
        growth={name: float(counts[key]) for name, key in GROWTH.items() if key in counts},
        alone=_alone(summary.get("control") or {}, metric),
        id=id,
    )


def _alone(control: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The metric of the controls that were trained, on the test set."""
    return {when: float(value) for when in CONTROLS if (value := (control.get(when) or {}).get(f"test/{metric}")) is not None}
