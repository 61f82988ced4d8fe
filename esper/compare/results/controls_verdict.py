"""The one sentence that a sweep over the built-in controls ends in: growing paid, did not, or cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from esper.compare.results.runs import POOLED, Run, by_seed
from esper.compare.results.wording import lacking, where
from esper.compare.statistics.gap_recovery import gap_recovery

if TYPE_CHECKING:
    from esper.compare.results.analysis import Judged
    from esper.compare.results.plan import Plan

GROWN, HOST, FINAL, EQUAL = "grown", "host", "scratch", "scratch_macs"


def conclude(verdicts: Sequence[Judged], runs: Sequence[Run], plan: Plan) -> list[str]:
    """Whether growing paid, and how much of the gap it closed; nothing for sweeps without these arms.

    It paid where the grown net is better than the host alone and than its own final net trained from scratch at equal
    MACs: better than the small host alone proves nothing, and neither does anything that costs more.
    """
    if plan.reference != GROWN or not {HOST, FINAL, EQUAL} <= plan.arms.keys():
        return []
    block = POOLED if len(plan.blocks) > 1 else plan.blocks[0]
    row = {one.arm: one for one in verdicts if one.block == block}
    if not {HOST, EQUAL} <= row.keys():
        return []
    return [_paid(row[HOST], row[EQUAL], plan), *(_gap(runs, plan, name) for name in plan.blocks)]


def _paid(host: Judged, equal: Judged, plan: Plan) -> str:
    """Differences are control − grown, so ``A better`` speaks for growing."""
    numbers = (
        f"{plan.metric} {-equal.difference:+.3g} against the final net from scratch at equal MACs, "
        f"{-host.difference:+.3g} against the host alone, {min(host.pairs, equal.pairs)} pairs, α = {plan.alpha:g} after Holm"
    )
    place = where(host.block, plan)
    if host.verdict == equal.verdict == "A better":
        return f"Growing paid{place}: {numbers}."
    lost = [name for one, name in ((equal, "the final net at equal MACs"), (host, "the host alone")) if _lost(one)]
    if lost:
        return f"Growing did not pay{place}: it is not better than {' or '.join(lost)}; {numbers}."
    lacks = [f"{name}: {lacking(one, plan)}" for one, name in ((equal, EQUAL), (host, HOST)) if one.needs is not None]
    return f"Cannot tell whether growing paid{place}: {numbers}. {'; '.join(lacks)}."


def _lost(one: Judged) -> bool:
    return one.verdict in ("B better", "equivalent")


def _gap(runs: Sequence[Run], plan: Plan, block: str) -> str:
    place = where(block, plan)
    sides = [by_seed(runs, arm, block) for arm in (HOST, FINAL, GROWN)]
    seeds = sorted(set.intersection(*({seed for seed, run in side.items() if not run.failed} for side in sides)))
    if len(seeds) < 2:
        return f"Gap recovery{place}: fewer than two complete seeds."
    found = gap_recovery(*(plan.sign * np.array([side[seed].value for seed in seeds]) for side in sides), plan.alpha)
    low, high = found.gap_interval
    gap = f"{plan.metric} {found.gap:+.3g} ({low:+.3g} to {high:+.3g})"
    if not found.known:
        return f"No gap recovery{place}: the gap between the host and the final net, {gap}, may be nothing."
    ends = " to ".join(f"{100 * end:.0f}" for end in found.value_interval)
    return f"Gap recovery{place}: {100 * found.value:.0f} % ({ends}) of the gap between the host and the final net, {gap}."
