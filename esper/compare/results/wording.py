"""Verdicts as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from esper.compare.results.runs import POOLED
from esper.compare.statistics.power import MOST_PAIRS

if TYPE_CHECKING:
    from esper.compare.results.analysis import Judged
    from esper.compare.results.plan import Plan
    from esper.compare.statistics.pairs_needed import Need

COSTS = {"macs": "MACs", "seconds": "time", "parameters": "parameters"}
NOTICED = {"macs": 0.01, "parameters": 0.01, "seconds": 0.1}  # relative difference in cost that a verdict mentions


def short(judged: Judged) -> str:
    """The verdict in a word, for a place beside the arm's name."""
    return {"B better": "better", "A better": "worse"}.get(judged.verdict, judged.verdict)


def where(block: str, plan: Plan) -> str:
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


def sentence(judged: Judged, plan: Plan) -> str:
    """One sentence: who, by how much, how sure, at what cost, and what is missing where nothing can be told."""
    low, high = judged.interval
    counted = " with failed runs counted as lost" if any(judged.failed) else ""
    shown = f"{plan.metric} {judged.difference:+.3g}{counted}" + (
        f" ({confidence(judged.level)} interval {low:+.3g} to {high:+.3g})" if math.isfinite(low) and math.isfinite(high) else ""
    )
    chance = judged.p_equivalent if judged.verdict == "equivalent" else judged.p_holm
    shown += f", {judged.pairs} pairs, p = {chance:.2g} after Holm"
    two, place = f"{judged.arm} and {judged.reference}", where(judged.block, plan)
    heads = {
        "B better": f"{judged.arm} is better than {judged.reference}{place}: {shown}",
        "A better": f"{judged.arm} is worse than {judged.reference}{place}: {shown}",
        "equivalent": f"{two} are equivalent{place}, closer than {plan.minimum_effect:g}: {shown}",
        "inconclusive": f"Cannot tell {judged.arm} from {judged.reference}{place}: {shown}",
    }
    asides = [_failures(judged), _small(judged, plan), _finer(judged), lacking(judged, plan)]
    return "; ".join([heads[judged.verdict] + _cost(judged), *filter(None, asides)]) + "."


def _cost(judged: Judged) -> str:
    told = [f"{ratio:.2f} × the {COSTS[name]}" for name, ratio in judged.costs.items() if name in COSTS and abs(ratio - 1) > NOTICED[name]]
    return f", at {', '.join(told)}" if told else ""


def _failures(judged: Judged) -> str:
    names = (judged.arm, judged.reference)
    told = [f"{count} of {name}" for count, name in zip(judged.failed, names, strict=True) if count]
    return f"failed runs: {', '.join(told)}" if told else ""


def _small(judged: Judged, plan: Plan) -> str:
    if judged.verdict in ("B better", "A better") and abs(judged.difference) < plan.minimum_effect and not any(judged.failed):
        return f"the difference seen is below the {plan.minimum_effect:g} worth having"
    return ""


def _finer(judged: Judged) -> str:
    """Said of a difference that one test sample more or less would make."""
    if 0 < abs(judged.difference) < judged.resolution:
        return f"the difference seen is smaller than one of {round(1 / judged.resolution):,} test samples ({judged.resolution:.2g})"
    return ""


def lacking(judged: Judged, plan: Plan) -> str:
    """How many more pairs would find which difference with which power, and how unsure that is; empty where nothing is missing."""
    needs = judged.needs
    if needs is None:
        return ""
    if judged.pairs < needs.fewest:
        few = f"{judged.pairs} pairs" if judged.pairs > 1 else "1 pair"
        return f"{few} can show no difference, {needs.fewest} are the fewest that can, where all of them point the same way"
    if not needs.rows:
        return "all differences are equal"
    told = [_need(need, judged.pairs, plan) for need in needs.rows]
    low, high = needs.spread_interval
    known = f"as the spread of the differences, {needs.spread:.2g} in these {judged.pairs} pairs, may be {low:.2g} to {high:.2g}"
    return f"with {plan.power:.0%} power {' and '.join(told)}, {known}"


def _need(need: Need, pairs: int, plan: Plan) -> str:
    difference = f"{need.difference:g}" if need.difference == plan.minimum_effect else f"the {need.difference:.2g} seen"
    if need.more:
        least, most = (_count(more) for more in need.between)
        return f"about {_count(need.more)} more pairs find {difference} ({least} to {most})"
    more = f" ({_count(need.between[1])} more at most)" if need.between[1] else ""
    return f"these {pairs} find {difference} already{more}"


def _count(pairs: int) -> str:
    return f"{pairs:,}" if pairs < MOST_PAIRS else f"more than {MOST_PAIRS:,}"
