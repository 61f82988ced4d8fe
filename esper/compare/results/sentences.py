"""The comparison in sentences: verdicts, notes, and whether growing paid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper.compare.results.comparison import Judgement
from esper.compare.results.groups import Groups
from esper.compare.results.plan import Plan, changes, pair_count
from esper.compare.results.runs import POOLED, Pairs, Run, by_seed, in_order
from esper.compare.statistics.estimates import gap_recovery, resolution
from esper.compare.statistics.power import MorePairs

GROWN, HOST, FINAL, EQUAL = "grown", "host", "scratch", "scratch_macs"
COSTS = {"macs": "MACs", "seconds": "time", "parameters": "parameters"}
NOTICED = {"macs": 0.01, "parameters": 0.01, "seconds": 0.1}  # relative difference in cost that a verdict mentions


def verdict_word(judged: Judgement) -> str:
    """The verdict in a word, for a place beside the arm's name."""
    return {"B better": "better", "A better": "worse"}.get(judged.verdict, judged.verdict)


def task_and_model(block: str, plan: Plan) -> str:
    """The task and the model, as ``" on digits with mlp"``, and the block where these do not name it."""
    if block == POOLED:
        shared = [about for name in plan.blocks if (about := plan.about.get(name, {}))]
        common = {key: value for key, value in (shared or [{}])[0].items() if all(one.get(key) == value for one in shared)}
        return f"{_named(common)} over all {len(plan.blocks)} blocks"
    about = plan.about.get(block, {})
    named = {about.get("task", ""), about.get("model", "")}
    told = {word.partition("=")[2] or word for word in block.split()} <= named
    return _named(about) + ("" if told else f" in {block}")


def _named(about: Mapping[str, Any]) -> str:
    return "".join(f" {word} {about[key]}" for word, key in (("on", "task"), ("with", "model")) if about.get(key))


def confidence(level: float) -> str:
    """A confidence level in percent, like ``95%`` or ``99.2%``."""
    return f"{100 * level:.3g}%" if level < 0.995 else f"{100 * level:.6g}%"


def counted_runs(judged: Judgement) -> str:
    """The runs that a verdict rests on, as ``15 pairs`` or ``15 and 12 runs, not paired``."""
    return f"{judged.pairs} pairs" if judged.pairs else f"{judged.counts[0]} and {judged.counts[1]} runs, not paired"


def sentence(judged: Judgement, plan: Plan) -> str:
    """One sentence: the arms, the difference, its certainty, its cost, and the pairs that are missing for a verdict."""
    low, high = judged.interval
    counted = " with failed runs counted as lost" if any(judged.failed) else ""
    shown = f"{plan.metric} {judged.difference:+.3g}{counted}" + (
        f" ({confidence(judged.level)} interval {low:+.3g} to {high:+.3g})" if math.isfinite(low) and math.isfinite(high) else ""
    )
    chance = judged.p_equivalent if judged.verdict == "equivalent" else judged.p_holm
    shown += f", {counted_runs(judged)}, p = {chance:.2g} after Holm"
    two, place = f"{judged.arm} and {judged.reference}", task_and_model(judged.block, plan)
    heads = {
        "B better": f"{judged.arm} is better than {judged.reference}{place}: {shown}",
        "A better": f"{judged.arm} is worse than {judged.reference}{place}: {shown}",
        "equivalent": f"{two} are equivalent{place}, closer than {plan.minimum_effect:g}: {shown}",
        "inconclusive": f"Cannot tell {judged.arm} from {judged.reference}{place}: {shown}",
    }
    asides = [_failures(judged), _small(judged, plan), _finer(judged), missing_pairs(judged, plan)]
    return "; ".join([heads[judged.verdict] + _cost(judged), *filter(None, asides)]) + "."


def _cost(judged: Judgement) -> str:
    told = [f"{ratio:.2f} × the {COSTS[name]}" for name, ratio in judged.costs.items() if name in COSTS and abs(ratio - 1) > NOTICED[name]]
    return f", at {', '.join(told)}" if told else ""


def _failures(judged: Judgement) -> str:
    names = (judged.arm, judged.reference)
    told = [f"{count} of {name}" for count, name in zip(judged.failed, names, strict=True) if count]
    return f"failed runs: {', '.join(told)}" if told else ""


def _small(judged: Judgement, plan: Plan) -> str:
    if judged.verdict in ("B better", "A better") and abs(judged.difference) < plan.minimum_effect and not any(judged.failed):
        return f"the difference seen is below the {plan.minimum_effect:g} worth having"
    return ""


def _finer(judged: Judgement) -> str:
    """An aside on a difference that one test sample more or less would make."""
    if 0 < abs(judged.difference) < judged.resolution:
        return f"the difference seen is smaller than one of {round(1 / judged.resolution):,} test samples ({judged.resolution:.2g})"
    return ""


def missing_pairs(judged: Judgement, plan: Plan) -> str:
    """How many more pairs would find which difference with which power, and how unsure that is; empty where nothing is missing."""
    needs = judged.needs
    if needs is None:
        return ""
    have = len(judged.points) if plan.paired else min(judged.counts)
    if have < needs.fewest:
        few = f"{have} {plan.unit}" if have > 1 or not plan.paired else "1 pair"
        alike = "all of them point the same way" if plan.paired else "no run of the one arm is as good as any of the other"
        return f"{few} can show no difference, {needs.fewest} are the fewest that can, where {alike}"
    if not needs.rows:
        return f"all {'differences' if plan.paired else 'runs of an arm'} are equal"
    told = [_need(need, have, plan) for need in needs.rows]
    low, high = needs.spread_interval
    of = (
        f"the differences, {needs.spread:.2g} in these {have} pairs"
        if plan.paired
        else f"the runs inside an arm, {needs.spread:.2g} in these"
    )
    return f"with {plan.power:.0%} power {' and '.join(told)}, as the spread of {of}, may be {low:.2g} to {high:.2g}"


def _need(need: MorePairs, have: int, plan: Plan) -> str:
    difference = f"{need.difference:g}" if need.difference == plan.minimum_effect else f"the {need.difference:.2g} seen"
    if need.more:
        least, most = (pair_count(more) for more in need.between)
        return f"about {pair_count(need.more)} more {plan.unit} find {difference} ({least} to {most})"
    more = f" ({pair_count(need.between[1])} more at most)" if need.between[1] else ""
    return f"these {have} find {difference} already{more}"


def exploratory_reasons(compared: Sequence[Pairs | Groups], plan: Plan, planned: Plan) -> list[str]:
    """Why the analysis is not the planned one; empty where it is."""
    reasons = [f"{name} was {getattr(planned, name)!r} in the plan and is {getattr(plan, name)!r} now" for name in changes(planned, plan)]
    fewest = min(len(set(one.seeds) & set(plan.seeds)) if plan.paired else _fewest_runs(one) for one in compared)
    if fewest < len(plan.seeds) and not plan.sequential:
        reasons.append(f"{fewest} of {len(plan.seeds)} planned {plan.unit} are there")
    return reasons


def _fewest_runs(one: Pairs | Groups) -> int:
    return min(min(sizes) for sizes in one.sizes) if isinstance(one, Groups) else 0


def notes(runs: Sequence[Run], plan: Plan) -> list[str]:
    """Notes that a reader needs besides the verdicts."""
    lines = []
    failed = [run for run in runs if run.failed]
    if failed:
        arms = {arm: sum(run.arm == arm for run in failed) for arm in plan.arms}
        told = ", ".join(f"{arm} {count}" for arm, count in arms.items() if count)
        counted = "a pair that one arm lost counts as the largest difference seen, and with it no two arms can be equivalent"
        if not plan.paired:
            counted = "each counts as worse than every run that finished, and with it no two arms can be equivalent"
        lines.append(f"{len(failed)} of {len(runs)} runs failed ({told}); {counted}.")
    for name, other in plan.couples:
        if plan.arms[name] == plan.arms[other]:
            lines.append(f"{name} and {other} have the same settings: this is an A/A test.")
    if plan.paired:
        lines += [*_same_numbers(runs, plan), *_without_partner(runs, plan)]
    else:
        lines.append(
            "The runs are not paired: the test exchanges the runs of two arms (a permutation test of the means, within each block). "
            "Pairs, runs of both arms with the same seed, would find smaller differences with as many runs where seeds matter."
        )
    if plan.sequential:
        lines.append(
            "The p-values count the looks: each is the smallest α at which the looks so far would have decided. "
            "The intervals are those of one look at all pairs that are there, and may disagree with them."
        )
    for block in plan.blocks:
        step = resolution([run.value for run in runs if run.block == block and not run.failed], plan.samples(block))
        if plan.minimum_effect < step:
            place, samples = f" in {block}" if block else "", plan.about[block]["samples"]
            lines.append(f"The {plan.minimum_effect:g} worth having is less than one of the {samples:,} test samples{place}.")
    if len(plan.seeds) < plan.fewest:
        lines.append(f"With fewer than {plan.fewest} {plan.unit} no arm can be called better, however clear the difference.")
    return lines


def _same_numbers(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A note on every arm whose runs gave exactly the results of the one that it is compared with."""
    lines = []
    for name, other in plan.couples:
        theirs = {block: by_seed(runs, other, block) for block in plan.blocks}
        pairs = [(run, theirs.get(run.block, {}).get(run.seed)) for run in runs if run.arm == name]
        if pairs and all(two and one.value == two.value for one, two in pairs):
            told = "what differs had no effect."
            if plan.arms[name] == plan.arms[other]:
                told = "with the same seeds they are the same runs; compare.fresh_seeds gives an arm seeds of its own."
            lines.append(f"{name} and {other} gave the same number in every pair: {told}")
    return lines


def _without_partner(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A note on the seeds that an arm or the one that it is compared with has not run, block by block."""
    lines = []
    pooled = ", here and over all blocks" if len(plan.blocks) > 1 else ""
    for block in plan.blocks:
        for arm, other in plan.couples:
            if seeds := in_order(by_seed(runs, arm, block).keys() ^ by_seed(runs, other, block).keys()):
                where = f" in {block}" if block else ""
                lines.append(f"Seeds {seeds} of {arm} or {other} have no partner{where} and are left out{pooled}.")
    return lines


def conclude(verdicts: Sequence[Judgement], runs: Sequence[Run], plan: Plan) -> list[str]:
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


def _paid(host: Judgement, equal: Judgement, plan: Plan) -> str:
    """Differences are control − grown, so ``A better`` speaks for growing."""
    numbers = (
        f"{plan.metric} {-equal.difference:+.3g} against the final net from scratch at equal MACs, "
        f"{-host.difference:+.3g} against the host alone, {min(host.pairs, equal.pairs)} pairs, α = {plan.alpha:g} after Holm"
    )
    place = task_and_model(host.block, plan)
    if host.verdict == equal.verdict == "A better":
        return f"Growing paid{place}: {numbers}."
    lost = [name for one, name in ((equal, "the final net at equal MACs"), (host, "the host alone")) if _lost(one)]
    if lost:
        return f"Growing did not pay{place}: it is not better than {' or '.join(lost)}; {numbers}."
    lacks = [f"{name}: {missing_pairs(one, plan)}" for one, name in ((equal, EQUAL), (host, HOST)) if one.needs is not None]
    return f"Cannot tell whether growing paid{place}: {numbers}. {'; '.join(lacks)}."


def _lost(one: Judgement) -> bool:
    return one.verdict in ("B better", "equivalent")


def _gap(runs: Sequence[Run], plan: Plan, block: str) -> str:
    place = task_and_model(block, plan)
    sides = [by_seed(runs, arm, block) for arm in (HOST, FINAL, GROWN)]
    seeds = in_order(set.intersection(*({seed for seed, run in side.items() if not run.failed} for side in sides)))
    if len(seeds) < 2:
        return f"Gap recovery{place}: fewer than two complete seeds."
    small, final, grown = (plan.sign * np.array([side[seed].value for seed in seeds]) for side in sides)
    found = gap_recovery(small, final, grown, plan.alpha)
    low, high = found.gap_interval
    gap = f"{plan.metric} {found.gap:+.3g} ({low:+.3g} to {high:+.3g})"
    if not found.known:
        return f"No gap recovery{place}: the gap between the host and the final net, {gap}, may be nothing."
    ends = " to ".join(f"{100 * end:.0f}" for end in found.value_interval)
    return f"Gap recovery{place}: {100 * found.value:.0f} % ({ends}) of the gap between the host and the final net, {gap}."
