"""The analysis of one sweep: from its runs and its plan to the comparison of its arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.comparison import ArmResult, Comparison, Judgement, Overall
from esper.compare.results.groups import Groups, group, pool_groups
from esper.compare.results.plan import Plan
from esper.compare.results.runs import POOLED, Pairs, Run, by_seed, in_order, pair, pool
from esper.compare.results.sentences import conclude, exploratory_reasons, notes, sentence
from esper.compare.statistics.estimates import iqm, resolution
from esper.compare.statistics.power import fewest_pairs
from esper.compare.statistics.profiles import bounds, interquartile_means, profile, resampled, thresholds
from esper.compare.statistics.sequential import look_pairs, sequential_holm, sequential_p
from esper.compare.statistics.sign_flip import flips_for
from esper.compare.statistics.verdicts import Verdict, classify, holm, holm_levels
from esper.errors import UserError

Array = NDArray[np.float64]
Compared = Pairs | Groups


def analyse(runs: Sequence[Run], plan: Plan, planned: Plan | None = None, partial: bool = False) -> Comparison:
    """Judge every arm against the reference, or the arm that the plan names in its place, block by block and pooled.

    Args:
        runs: all jobs of the sweep, failed ones included.
        plan: the plan to judge by; ``planned`` is the one that was saved before the first run, where that is another.
        partial: the sweep was stopped by its time limit: what has no pair yet is left out.

    Raises:
        UserError: no runs, all failed, or an arm that shares no seed with the reference.
    """
    if not runs:
        raise UserError("The sweep has no runs; start it, or look for its id in the list of sweeps.")
    if all(run.failed for run in runs):
        raise UserError(f"All {len(runs)} runs of the sweep failed or gave no finite {plan.metric}; the log of each job says why.")
    compared = comparisons(runs, plan.couples, plan, partial)
    verdicts = judge(compared, runs, plan)
    return Comparison(
        arms=[arm_result(runs, arm, block) for block in plan.blocks for arm in plan.arms],
        verdicts=verdicts,
        exploratory=exploratory_reasons(compared, plan, planned or plan),
        notes=notes(runs, plan),
        ranking=_ranking(runs, plan, partial) if plan.ranking else [],
        conclusion=conclude(verdicts, runs, plan),
        overall=_overall(runs, plan) if len(plan.blocks) > 1 else [],
    )


def comparisons(runs: Sequence[Run], couples: Sequence[tuple[str, str]], plan: Plan, partial: bool = False) -> list[Compared]:
    """Every couple of arms block by block, and over all blocks, as far as the plan asks for either; at least one.

    Raises:
        UserError: the runs give none.
    """
    found: list[Compared] = []
    cells = {
        couple: {block: _couple(runs, couple, block, plan) for block in plan.blocks if not partial or _shared(runs, couple, block)}
        for couple in couples
    }
    for block in plan.blocks if plan.apart else ():
        found += [blocks[block] for blocks in cells.values() if block in blocks]
    if plan.pools:
        over = [_pooled(list(blocks.values())) for blocks in cells.values() if len(blocks) == len(plan.blocks)]
        found += [one for one in over if one is not None]
    if not found:
        raise UserError(
            "No seed was run in all blocks by both arms, so there is nothing to pool; run the missing ones, or judge the blocks apart."
        )
    return found


def _shared(runs: Sequence[Run], couple: tuple[str, str], block: str) -> bool:
    """Whether some seed was run by both arms."""
    ours, theirs = (by_seed(runs, arm, block).keys() for arm in couple)
    return not ours.isdisjoint(theirs)


def _couple(runs: Sequence[Run], couple: tuple[str, str], block: str, plan: Plan) -> Compared:
    form = pair if plan.paired else group
    return form(runs, *couple, block, plan.sign, plan.minimum_effect)


def _pooled(blocks: Sequence[Compared]) -> Compared | None:
    groups = [one for one in blocks if isinstance(one, Groups)]
    return pool_groups(groups) if groups else pool([one for one in blocks if isinstance(one, Pairs)])


def arm_result(runs: Sequence[Run], arm: str, block: str) -> ArmResult:
    """The result of one arm in one block."""
    mine = by_seed(runs, arm, block)
    good = {seed: mine[seed] for seed in in_order(mine) if not mine[seed].failed}
    values = np.array([run.value for run in good.values()])
    return ArmResult(
        arm=arm,
        block=block,
        runs=len(mine),
        failed=len(mine) - len(good),
        mean=float(values.mean()) if len(values) else float("nan"),
        iqm=iqm(values) if len(values) else float("nan"),
        spread=float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        costs=_means([run.costs for run in good.values()]),
        growth=_means([run.growth for run in good.values()]),
        alone=_means([run.alone for run in good.values()]),
        points={seed: run.value for seed, run in good.items()},
        cost_points={
            name: {seed: run.costs[name] for seed, run in good.items() if name in run.costs}
            for name in sorted({name for run in good.values() for name in run.costs})
        },
    )


def _means(reported: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the runs that report it."""
    names = sorted({name for numbers in reported for name in numbers})
    return {name: float(np.mean([numbers[name] for numbers in reported if name in numbers])) for name in names}


def judge(compared: Sequence[Compared], runs: Sequence[Run], plan: Plan) -> list[Judgement]:
    """One verdict for every comparison, corrected together."""
    level = plan.alpha / len(compared)
    flips = [flips_for(level, one.size) for one in compared]
    p_each = np.array([one.p_equivalence(plan.minimum_effect, number) for one, number in zip(compared, flips, strict=True)])
    p_same = holm(p_each)
    means = np.array([one.difference for one in compared])
    if plan.sequential:
        p, p_holm, complete = _looked([one for one in compared if isinstance(one, Pairs)], plan)
        p_same = p_same if complete else np.ones_like(p_same)
    else:
        p = np.array([one.p_difference(number) for one, number in zip(compared, flips, strict=True)])
        p_holm = holm(p)
    codes = classify(means, p_holm, p_same, plan.alpha)
    levels = zip(holm_levels(p, p_holm, plan.alpha), holm_levels(p_each, p_same, plan.alpha), strict=True)
    return [
        _judged(one, runs, plan, Verdict(code), (float(a), float(b), float(c)), (float(level), float(same)))
        for one, code, a, b, c, (level, same) in zip(compared, codes, p, p_holm, p_same, levels, strict=True)
    ]


def _looked(compared: Sequence[Pairs], plan: Plan) -> tuple[Array, Array, bool]:
    """P-values that count the looks, before and after Holm, and whether all planned pairs are there."""
    have = set.intersection(*(set(one.seeds) for one in compared))
    seeds = []
    for seed in plan.seeds:  # looks count pairs in the planned order, without gaps
        if seed not in have:
            break
        seeds.append(seed)
    places = [[one.seeds.index(seed) for seed in seeds] for one in compared]
    rows = np.stack([one.tested[place] for one, place in zip(compared, places, strict=True)], axis=1)
    error = np.stack([one.error[place] for one, place in zip(compared, places, strict=True)], axis=1)
    looks = look_pairs(len(plan.seeds), plan.looks, fewest_pairs(plan.alpha, len(compared)))
    flips = flips_for(plan.alpha / len(compared), len(plan.seeds))
    rejected = sequential_holm(rows[:, :, None], looks, len(plan.seeds), plan.alpha, error=error, flips=flips)[:, 0]
    p = sequential_p(rows, looks, len(plan.seeds), error=error, flips=flips)
    # the smallest level is found approximately: a decision of the looks at α stays on its side of it
    p_holm = np.where(rejected, holm(p).clip(max=plan.alpha), holm(p).clip(min=np.nextafter(plan.alpha, 1)))
    return p, p_holm, len(seeds) == len(plan.seeds)


def _judged(
    one: Compared, runs: Sequence[Run], plan: Plan, verdict: Verdict, p: tuple[float, float, float], levels: tuple[float, float]
) -> Judgement:
    """``levels`` are those at which Holm's correction tests this comparison for a difference and for equivalence."""
    blocks = plan.blocks if one.block == POOLED else (one.block,)
    ours = [run for block in blocks for run in by_seed(runs, one.arm, block).values()]
    theirs = [run for block in blocks for run in by_seed(runs, one.reference, block).values()]
    good, base = ([run for run in side if not run.failed] for side in (ours, theirs))
    judged = Judgement(
        arm=one.arm,
        reference=one.reference,
        block=one.block,
        verdict=verdict.label,
        sentence="",
        difference=one.difference,
        difference_finished=one.difference_finished,
        p=p[0],
        p_holm=p[1],
        p_equivalent=p[2],
        interval=one.interval(levels[0]),
        level=1 - levels[0],
        equivalence_interval=one.equivalence_interval(levels[1]),
        equivalence_level=1 - 2 * levels[1],
        probability=one.probability,
        pairs=len(one.seeds) if plan.paired else 0,
        counts=one.counts,
        failed=(len(ours) - len(good), len(theirs) - len(base)),
        costs=_cost_ratios(good, base),
        resolution=resolution([run.value for run in (*good, *base)], plan.samples(one.block)),
        needs=one.needs(plan.minimum_effect, plan.power, plan.alpha, plan.comparisons, plan.early)
        if verdict is Verdict.INCONCLUSIVE
        else None,
        seeds=one.seeds,
        points=one.points,
        finished=tuple(one.finished.tolist()),
    )
    return replace(judged, sentence=sentence(judged, plan))


def _cost_ratios(good: Sequence[Run], base: Sequence[Run]) -> dict[str, float]:
    """Mean cost of the arm divided by that of the reference, for the costs that both report."""
    ratios = {}
    for name in sorted({n for run in good for n in run.costs} & {n for run in base for n in run.costs}):
        ours, theirs = (_means([run.costs for run in side])[name] for side in (good, base))
        if theirs > 0:
            ratios[name] = ours / theirs
    return ratios


def _ranking(runs: Sequence[Run], plan: Plan, partial: bool) -> list[Judgement]:
    """Every arm against every other, pooled over the blocks and corrected together."""
    names = list(plan.arms)
    couples = [(second, first) for i, first in enumerate(names) for second in names[i + 1 :]]
    over = replace(plan, pooling="pooled") if len(plan.blocks) > 1 else plan
    return judge(comparisons(runs, couples, over, partial), runs, plan)


def _overall(runs: Sequence[Run], plan: Plan) -> list[Overall]:
    """Every arm over all blocks, in each of which it has a run that finished; the values are as they were measured."""
    values = {
        arm: [np.array([plan.sign * run.value for run in by_seed(runs, arm, block).values() if not run.failed]) for block in plan.blocks]
        for arm in plan.arms
    }
    whole = {arm: blocks for arm, blocks in values.items() if all(map(len, blocks))}
    if not whole:
        return []
    at = thresholds(np.concatenate([one for blocks in whole.values() for one in blocks]))
    return [_one_overall(arm, blocks, at, plan.sign) for arm, blocks in whole.items()]


def _one_overall(arm: str, blocks: Sequence[Array], at: Array, sign: float) -> Overall:
    seen, drawn = np.concatenate(blocks)[None, :], resampled(blocks)
    low, high = (sign * float(end) for end in bounds(interquartile_means(drawn)))
    ends = bounds(profile(drawn, at))
    rows = zip(sign * at, profile(seen, at)[0], *ends, strict=True)
    return Overall(
        arm=arm,
        runs=seen.shape[1],
        iqm=sign * float(interquartile_means(seen)[0]),
        interval=(min(low, high), max(low, high)),
        profile=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in rows),
    )
