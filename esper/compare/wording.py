"""Verdicts as sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from esper.compare.power import MOST_PAIRS
from esper.compare.runs import POOLED

if TYPE_CHECKING:
    from esper.compare.analysis import Judged
    from esper.compare.plan import Plan

COSTS = {"macs": "MACs", "seconds": "time", "parameters": "parameters"}
NOTICED = {"macs": 0.01, "parameters": 0.01, "seconds": 0.1}  # relative difference in cost that a verdict mentions


def short(judged: Judged) -> str:
    """The verdict in a word, for a place beside the arm's name."""
    return {"B better": "better", "A better": "worse"}.get(judged.verdict, judged.verdict)


def sentence(judged: Judged, plan: Plan) -> str:
    """One sentence: who, by how much, how sure, at what cost, and what is missing where nothing can be told."""
    where = " over all blocks" if judged.block == POOLED else (f" in {judged.block}" if judged.block else "")
    low, high = judged.interval
    counted = " with failed runs counted as lost" if any(judged.failed) else ""
    shown = f"{plan.metric} {judged.difference:+.3g}{counted}" + (
        f" ({low:+.3g} to {high:+.3g})" if math.isfinite(low) and math.isfinite(high) else ""
    )
    chance = judged.p_equivalent if judged.verdict == "equivalent" else judged.p_holm
    shown += f", {judged.pairs} pairs, p = {chance:.2g} after Holm"
    two = f"{judged.arm} and {judged.reference}"
    heads = {
        "B better": f"{judged.arm} is better than {judged.reference}{where}: {shown}",
        "A better": f"{judged.arm} is worse than {judged.reference}{where}: {shown}",
        "equivalent": f"{two} are equivalent{where}, closer than {plan.minimum_effect:g}: {shown}",
        "inconclusive": f"Cannot tell {judged.arm} from {judged.reference}{where}: {shown}",
    }
    return heads[judged.verdict] + _cost(judged) + _failures(judged) + _aside(judged, plan) + "."


def _cost(judged: Judged) -> str:
    told = [f"{ratio:.2f} × the {COSTS[name]}" for name, ratio in judged.costs.items() if name in COSTS and abs(ratio - 1) > NOTICED[name]]
    return f", at {', '.join(told)}" if told else ""


def _failures(judged: Judged) -> str:
    names = (judged.arm, judged.reference)
    told = [f"{count} of {name}" for count, name in zip(judged.failed, names, strict=True) if count]
    return f"; failed runs: {', '.join(told)}" if told else ""


def _aside(judged: Judged, plan: Plan) -> str:
    if judged.verdict in ("B better", "A better") and abs(judged.difference) < plan.minimum_effect and not any(judged.failed):
        return f"; the difference seen is below the {plan.minimum_effect:g} worth having"
    if judged.verdict != "inconclusive":
        return ""
    if judged.more_pairs >= MOST_PAIRS // 2:
        return "; no feasible number of pairs would"
    return f"; about {judged.more_pairs} more pairs needed" if judged.more_pairs else "; the power planned for was there"
