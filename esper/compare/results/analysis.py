"""The analysis of one sweep: from its runs and its plan to the comparison of its arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.comparison import ArmResult, Comparison, Judgement
from esper.compare.results.plan import Plan
from esper.compare.results.runs import POOLED, Pairs, Run, by_seed, pair, pool
from esper.compare.results.sentences import conclude, exploratory_reasons, notes, sentence
from esper.compare.statistics.estimates import iqm, probability_of_improvement, resolution
from esper.compare.statistics.power import PairsNeeded, fewest_pairs, pairs_needed
from esper.compare.statistics.sequential import look_pairs, sequential_holm, sequential_p
from esper.compare.statistics.sign_flip import FLIPS, equivalence, equivalence_interval, flips_for, interval, sign_flip
from esper.compare.statistics.verdicts import Verdict, classify, holm, holm_levels
from esper.errors import UserError

Array = NDArray[np.float64]


def analyse(runs: Sequence[Run], plan: Plan, planned: Plan | None = None) -> Comparison:
    """Judge every arm against the reference, block by block and pooled.

    Args:
        runs: all jobs of the sweep, failed ones included.
        plan: the plan to judge by; ``planned`` is the one that was saved before the first run, where that is another.

    Raises:
        UserError: no runs, all failed, or an arm that shares no seed with the reference.
    """
    if not runs:
        raise UserError("The sweep has no runs; start it, or look for its id in the list of sweeps.")
    if all(run.failed for run in runs):
        raise UserError(f"All {len(runs)} runs of the sweep failed or gave no finite {plan.metric}; the log of each job says why.")
    others = [arm for arm in plan.arms if arm != plan.reference]
    blocks = [[pair(runs, arm, plan.reference, block, plan.sign, plan.minimum_effect) for arm in others] for block in plan.blocks]
    compared = [one for block in blocks for one in block]
    if len(plan.blocks) > 1:
        pooled = [pool(list(column)) for column in zip(*blocks, strict=True)]
        compared += [one for one in pooled if one is not None]
    verdicts = judge(compared, runs, plan)
    return Comparison(
        arms=[arm_result(runs, arm, block) for block in plan.blocks for arm in plan.arms],
        verdicts=verdicts,
        exploratory=exploratory_reasons(compared, plan, planned or plan),
        notes=notes(runs, plan),
        ranking=_ranking(runs, plan) if plan.ranking else [],
        conclusion=conclude(verdicts, runs, plan),
    )


def arm_result(runs: Sequence[Run], arm: str, block: str) -> ArmResult:
    """The result of one arm in one block."""
    mine = by_seed(runs, arm, block)
    good = {seed: run for seed, run in sorted(mine.items()) if not run.failed}
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
        macs={seed: run.costs["macs"] for seed, run in good.items() if "macs" in run.costs},
    )


def _means(reported: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every number over the runs that report it."""
    names = sorted({name for numbers in reported for name in numbers})
    return {name: float(np.mean([numbers[name] for numbers in reported if name in numbers])) for name in names}


def judge(compared: Sequence[Pairs], runs: Sequence[Run], plan: Plan) -> list[Judgement]:
    """One verdict for every comparison, corrected together."""
    level = plan.alpha / len(compared)
    flips = [flips_for(level, len(one.tested)) for one in compared]
    p_each = np.array([equivalence_of(one, plan.minimum_effect, number) for one, number in zip(compared, flips, strict=True)])
    p_same = holm(p_each)
    means = np.array([one.tested.mean() for one in compared])
    if plan.sequential:
        p, p_holm, complete = _looked(compared, plan)
        p_same = p_same if complete else np.ones_like(p_same)
    else:
        p = np.array([float(sign_flip(one.tested, error=one.error, flips=number)) for one, number in zip(compared, flips, strict=True)])
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
    one: Pairs, runs: Sequence[Run], plan: Plan, verdict: Verdict, p: tuple[float, float, float], levels: tuple[float, float]
) -> Judgement:
    """``levels`` are those at which Holm's correction tests this comparison for a difference and for equivalence."""
    blocks = plan.blocks if one.block == POOLED else (one.block,)
    ours = [run for block in blocks for run in by_seed(runs, one.arm, block).values()]
    theirs = [run for block in blocks for run in by_seed(runs, one.reference, block).values()]
    good, base = ([run for run in side if not run.failed] for side in (ours, theirs))
    kept, unsure = one.tested[one.finished], one.error[one.finished]
    nowhere = (float("nan"), float("nan"))
    judged = Judgement(
        arm=one.arm,
        reference=one.reference,
        block=one.block,
        verdict=verdict.label,
        sentence="",
        difference=float(one.tested.mean()),
        difference_finished=float(kept.mean()) if len(kept) else float("nan"),
        p=p[0],
        p_holm=p[1],
        p_equivalent=p[2],
        interval=interval(one.tested, levels[0], one.error),
        level=1 - levels[0],
        equivalence_interval=nowhere if one.lost.any() or not len(kept) else equivalence_interval(kept, levels[1], unsure),
        equivalence_level=1 - 2 * levels[1],
        probability=probability_of_improvement(one.tested, one.error),
        pairs=len(one.seeds),
        failed=(len(ours) - len(good), len(theirs) - len(base)),
        costs=_cost_ratios(good, base),
        resolution=resolution([run.value for run in (*good, *base)], plan.samples(one.block)),
        needs=_pairs_needed(one, plan) if verdict is Verdict.INCONCLUSIVE else None,
        seeds=one.seeds,
        points=tuple(one.tested.tolist()),
        finished=tuple(one.finished.tolist()),
    )
    return replace(judged, sentence=sentence(judged, plan))


def _pairs_needed(one: Pairs, plan: Plan) -> PairsNeeded:
    return pairs_needed(one.tested, one.error, plan.minimum_effect, plan.power, plan.alpha, plan.comparisons, plan.early)


def _cost_ratios(good: Sequence[Run], base: Sequence[Run]) -> dict[str, float]:
    """Mean cost of the arm divided by that of the reference, for the costs that both report."""
    ratios = {}
    for name in sorted({n for run in good for n in run.costs} & {n for run in base for n in run.costs}):
        ours, theirs = (_means([run.costs for run in side])[name] for side in (good, base))
        if theirs > 0:
            ratios[name] = ours / theirs
    return ratios


def _ranking(runs: Sequence[Run], plan: Plan) -> list[Judgement]:
    """Every arm against every other, pooled over the blocks and corrected together."""
    names, couples = list(plan.arms), []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            found = [pair(runs, second, first, block, plan.sign, plan.minimum_effect) for block in plan.blocks]
            both = pool(found) if len(found) > 1 else found[0]
            if both is not None:
                couples.append(both)
    return judge(couples, runs, plan) if couples else []


def equivalence_of(pairs: Pairs, margin: float, flips: int = FLIPS) -> float:
    """P-value of "the arms differ by ``margin`` or more", by TOST over the pairs in which both runs finished.

    1 as soon as one arm alone failed in a pair. A failed run has no metric that could be shown to be near the other's:
    it is worse than any value, as in worst-rank analysis (Lachin 1999, Controlled Clinical Trials 20:408) and the
    composite strategy of ICH E9(R1), so its pair lies outside every margin. With such losses growing without bound the
    larger of the two one-sided p-values stays at 1/4 or above, however many other pairs there are. Pairs in which both
    runs failed show nothing and are left out here.
    """
    if pairs.lost.any():
        return 1.0
    return float(equivalence(pairs.tested[pairs.finished], margin, error=pairs.error[pairs.finished], flips=flips))
