"""The analysis of one sweep: its runs and its plan in, verdicts with everything that belongs beside them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.controls_verdict import conclude
from esper.compare.results.plan import Plan, changes
from esper.compare.results.runs import POOLED, Pairs, Run, by_seed, pair, pool
from esper.compare.results.tuning_choice import Tuned
from esper.compare.results.verdict import Verdict, classify, equivalence_of
from esper.compare.results.wording import sentence
from esper.compare.statistics.corrections import holm, holm_levels, iqm, probability_of_improvement
from esper.compare.statistics.pairs_needed import Needs, needs_of
from esper.compare.statistics.power import fewest_pairs
from esper.compare.statistics.sequential import look_pairs, sequential_holm, sequential_p
from esper.compare.statistics.sign_flip import equivalence_interval, flips_for, interval, sign_flip
from esper.errors import UserError

Array = NDArray[np.float64]
COUNTED = 1e-4  # how near whole numbers the values times the samples are where the metric counts samples; float32 may hold them


@dataclass(frozen=True)
class ArmSummary:
    """One arm in one block: quality, failures, cost, growth and controls over its runs (means over the finished ones)."""

    arm: str
    block: str
    runs: int
    failed: int
    mean: float
    iqm: float
    spread: float
    costs: dict[str, float]
    growth: dict[str, float]
    alone: dict[str, float]
    points: dict[int, float]
    macs: dict[int, float]


@dataclass(frozen=True)
class Judged:
    """One comparison. Differences are positive where ``arm`` (B) is better than ``reference`` (A).

    ``interval`` is that of the test for a difference and has the confidence ``level`` that Holm's correction leaves it: it excludes 0
    exactly where the difference is sure. ``equivalence_interval`` lies within the margin exactly where the arms are equivalent; it is
    NaN where a run that failed keeps them from it. ``resolution`` is the smallest change of the metric that the test set can show,
    NaN where the metric does not count samples; ``needs`` is None where the verdict lacks nothing.
    """

    arm: str
    reference: str
    block: str
    verdict: str
    sentence: str
    difference: float
    difference_finished: float
    p: float
    p_holm: float
    p_equivalent: float
    interval: tuple[float, float]
    level: float
    equivalence_interval: tuple[float, float]
    equivalence_level: float
    probability: float
    pairs: int
    failed: tuple[int, int]
    costs: dict[str, float]
    resolution: float
    needs: Needs | None
    seeds: tuple[int, ...]
    points: tuple[float, ...]
    finished: tuple[bool, ...]


@dataclass(frozen=True)
class Comparison:
    """What ``comparison.json`` holds besides the plan."""

    arms: list[ArmSummary]
    verdicts: list[Judged]
    exploratory: list[str]
    notes: list[str]
    ranking: list[Judged] = field(default_factory=list)
    conclusion: list[str] = field(default_factory=list)
    tuned: list[Tuned] = field(default_factory=list)


def analyse(runs: Sequence[Run], plan: Plan, planned: Plan | None = None) -> Comparison:
    """Judge every arm against the reference, block by block and pooled.

    Args:
        runs: all jobs of the sweep, failed ones included.
        plan: what to judge by; ``planned`` is what was saved before the first run, where that was another one.

    Raises:
        UserError: no runs, all failed, or an arm that shares no seed with the reference.
    """
    if not runs:
        raise UserError("The sweep has no runs; start it, or look for its id in the list of sweeps.")
    if all(run.failed for run in runs):
        raise UserError(f"All {len(runs)} runs of the sweep failed or gave no finite {plan.metric}; the log of each job says why.")
    others = [arm for arm in plan.arms if arm != plan.reference]
    blocks = [[pair(runs, arm, plan.reference, block, plan.sign, plan.minimum_effect) for arm in others] for block in plan.blocks]
    families = [one for block in blocks for one in block]
    if len(plan.blocks) > 1:
        pooled = [pool(list(column)) for column in zip(*blocks, strict=True)]
        families += [one for one in pooled if one is not None]
    verdicts = judge(families, runs, plan)
    return Comparison(
        arms=[summarize(runs, arm, block) for block in plan.blocks for arm in plan.arms],
        verdicts=verdicts,
        exploratory=_exploratory(families, plan, planned or plan),
        notes=_notes(runs, plan),
        ranking=_ranking(runs, plan) if plan.ranking else [],
        conclusion=conclude(verdicts, runs, plan),
    )


def with_tuned(comparison: Comparison, tuned: Sequence[Tuned]) -> Comparison:
    """The comparison with what tuning chose beforehand, and a note on every tuning run that failed."""
    return replace(comparison, tuned=list(tuned), notes=[*comparison.notes, *(line for one in tuned for line in one.warning())])


def summarize(runs: Sequence[Run], arm: str, block: str) -> ArmSummary:
    """The runs of one arm in one block in a line."""
    mine = by_seed(runs, arm, block)
    good = {seed: run for seed, run in sorted(mine.items()) if not run.failed}
    values = np.array([run.value for run in good.values()])
    return ArmSummary(
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


def judge(families: Sequence[Pairs], runs: Sequence[Run], plan: Plan) -> list[Judged]:
    """One verdict for every comparison, corrected together."""
    level = plan.alpha / len(families)
    flips = [flips_for(level, len(one.tested)) for one in families]
    p_each = np.array([equivalence_of(one, plan.minimum_effect, number) for one, number in zip(families, flips, strict=True)])
    p_same = holm(p_each)
    means = np.array([one.tested.mean() for one in families])
    if plan.sequential:
        p, p_holm, complete = _looked(families, plan)
        p_same = p_same if complete else np.ones_like(p_same)
    else:
        p = np.array([float(sign_flip(one.tested, error=one.error, flips=number)) for one, number in zip(families, flips, strict=True)])
        p_holm = holm(p)
    codes = classify(means, p_holm, p_same, plan.alpha)
    levels = zip(holm_levels(p, p_holm, plan.alpha), holm_levels(p_each, p_same, plan.alpha), strict=True)
    return [
        _judged(one, runs, plan, Verdict(code), (float(a), float(b), float(c)), (float(level), float(same)))
        for one, code, a, b, c, (level, same) in zip(families, codes, p, p_holm, p_same, levels, strict=True)
    ]


def _looked(families: Sequence[Pairs], plan: Plan) -> tuple[Array, Array, bool]:
    """P-values that count the looks, before and after Holm, and whether all planned pairs are there."""
    have = set.intersection(*(set(one.seeds) for one in families))
    seeds = []
    for seed in plan.seeds:  # looks count pairs in the planned order, without gaps
        if seed not in have:
            break
        seeds.append(seed)
    places = [[one.seeds.index(seed) for seed in seeds] for one in families]
    rows = np.stack([one.tested[place] for one, place in zip(families, places, strict=True)], axis=1)
    error = np.stack([one.error[place] for one, place in zip(families, places, strict=True)], axis=1)
    looks = look_pairs(len(plan.seeds), plan.looks, fewest_pairs(plan.alpha, len(families)))
    flips = flips_for(plan.alpha / len(families), len(plan.seeds))
    rejected = sequential_holm(rows[:, :, None], looks, len(plan.seeds), plan.alpha, error=error, flips=flips)[:, 0]
    p = sequential_p(rows, looks, len(plan.seeds), error=error, flips=flips)
    # the smallest level is found nearly: what the looks decide at α stays on its side of it
    p_holm = np.where(rejected, holm(p).clip(max=plan.alpha), holm(p).clip(min=np.nextafter(plan.alpha, 1)))
    return p, p_holm, len(seeds) == len(plan.seeds)


def _judged(
    one: Pairs, runs: Sequence[Run], plan: Plan, verdict: Verdict, p: tuple[float, float, float], levels: tuple[float, float]
) -> Judged:
    """``levels`` are those at which Holm's correction tests this comparison for a difference and for equivalence."""
    blocks = plan.blocks if one.block == POOLED else (one.block,)
    ours = [run for block in blocks for run in by_seed(runs, one.arm, block).values()]
    theirs = [run for block in blocks for run in by_seed(runs, one.reference, block).values()]
    good, base = ([run for run in side if not run.failed] for side in (ours, theirs))
    kept, unsure = one.tested[one.finished], one.error[one.finished]
    nowhere = (float("nan"), float("nan"))
    judged = Judged(
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
        resolution=resolution([run.value for run in (*good, *base)], plan, one.block),
        needs=needs_of(one, plan) if verdict is Verdict.INCONCLUSIVE else None,
        seeds=one.seeds,
        points=tuple(one.tested.tolist()),
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


def resolution(values: Sequence[float], plan: Plan, block: str) -> float:
    """The smallest change of the metric that the block's test set can show: 1/n where every value is a count of its n samples.

    NaN where it is not, as for a loss, and where n is not known.
    """
    samples = plan.about.get(block, {}).get("samples", 0)
    if not samples or not len(values):
        return float("nan")
    counts = np.array(values) * samples
    return 1 / samples if np.abs(counts - np.round(counts)).max() < COUNTED else float("nan")


def _ranking(runs: Sequence[Run], plan: Plan) -> list[Judged]:
    """Every arm against every other, the better of each couple first, corrected together; blocks are pooled."""
    names, couples = list(plan.arms), []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            found = [pair(runs, second, first, block, plan.sign, plan.minimum_effect) for block in plan.blocks]
            both = pool(found) if len(found) > 1 else found[0]
            if both is not None:
                couples.append(both)
    return judge(couples, runs, plan) if couples else []


def _exploratory(families: Sequence[Pairs], plan: Plan, planned: Plan) -> list[str]:
    """Why the analysis is not the planned one; empty where it is."""
    reasons = [f"{name} was {getattr(planned, name)!r} in the plan and is {getattr(plan, name)!r} now" for name in changes(planned, plan)]
    fewest = min(len(set(one.seeds) & set(plan.seeds)) for one in families)
    if fewest < len(plan.seeds) and not plan.sequential:
        reasons.append(f"{fewest} of {len(plan.seeds)} planned pairs are there")
    return reasons


def _notes(runs: Sequence[Run], plan: Plan) -> list[str]:
    """What a reader must know besides the verdicts."""
    notes = []
    failed = [run for run in runs if run.failed]
    if failed:
        arms = {arm: sum(run.arm == arm for run in failed) for arm in plan.arms}
        told = ", ".join(f"{arm} {count}" for arm, count in arms.items() if count)
        counted = "a pair that one arm lost counts as the largest difference seen, and with it no two arms can be equivalent"
        notes.append(f"{len(failed)} of {len(runs)} runs failed ({told}); {counted}.")
    for name, settings in plan.arms.items():
        if name != plan.reference and settings == plan.arms[plan.reference]:
            notes.append(f"{name} and {plan.reference} have the same settings: this is an A/A test.")
    notes += [*_same_numbers(runs, plan), *_alone(runs, plan)]
    if plan.sequential:
        notes.append(
            "The p-values count the looks: each is the smallest α at which the looks so far would have decided. "
            "The intervals are those of one look at all pairs that are there, and may disagree with them."
        )
    for block in plan.blocks:
        step = resolution([run.value for run in runs if run.block == block and not run.failed], plan, block)
        if plan.minimum_effect < step:
            place, samples = f" in {block}" if block else "", plan.about[block]["samples"]
            notes.append(f"The {plan.minimum_effect:g} worth having is less than one of the {samples:,} test samples{place}.")
    if len(plan.seeds) < fewest_pairs(plan.alpha, plan.comparisons):
        fewest = fewest_pairs(plan.alpha, plan.comparisons)
        notes.append(f"With fewer than {fewest} pairs no arm can be called better, however clear the difference.")
    return notes


def _same_numbers(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A note on every arm whose runs gave just what those of the reference gave."""
    notes = []
    for name, settings in plan.arms.items():
        pairs = [(run, by_seed(runs, plan.reference, run.block).get(run.seed)) for run in runs if run.arm == name]
        if name != plan.reference and pairs and all(two and one.value == two.value for one, two in pairs):
            told = "what differs had no effect."
            if settings == plan.arms[plan.reference]:
                told = "with the same seeds they are the same runs; compare.fresh_seeds gives an arm seeds of its own."
            notes.append(f"{name} and {plan.reference} gave the same number in every pair: {told}")
    return notes


def _alone(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A note on the seeds that an arm or the reference has not run, block by block."""
    notes = []
    pooled = ", here and over all blocks" if len(plan.blocks) > 1 else ""
    for block in plan.blocks:
        reference = by_seed(runs, plan.reference, block)
        for arm in plan.arms:
            if seeds := sorted(by_seed(runs, arm, block).keys() ^ reference.keys()):
                where = f" in {block}" if block else ""
                notes.append(f"Seeds {seeds} of {arm} or {plan.reference} have no partner{where} and are left out{pooled}.")
    return notes
