"""The tables of a comparison as plain text cells, for every form in which they are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esper.compare.results.comparison import Comparison, Judgement
from esper.compare.results.plan import Plan
from esper.compare.results.sentences import confidence, verdict_word

CONTROLS = {"same_steps": "host alone, same steps", "same_macs": "host alone, same MACs"}
HEADINGS = {"macs": "MACs", "seconds": "time, s", "germinations": "germinated"}  # short: names of arms need the room


@dataclass(frozen=True)
class Cells:
    """Headings, and rows of as many cells; the first ``words`` columns hold words, the others numbers."""

    headings: list[str]
    rows: list[list[str]]
    words: int


def _where(comparison: Comparison) -> bool:
    return any(arm.block for arm in comparison.arms)


def _begin(comparison: Comparison, block: str, arm: str) -> list[str]:
    return [block, arm] if _where(comparison) else [arm]


def _headings(comparison: Comparison) -> list[str]:
    return ["block", "arm"] if _where(comparison) else ["arm"]


def number(value: float | None) -> str:
    """A number in a cell, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"


def interval_text(row: Judgement) -> str:
    """The interval and its level, "none" where so few pairs have none."""
    low, high = row.interval
    return f"{low:+.2g} … {high:+.2g} ({confidence(row.level)})" if math.isfinite(low) and math.isfinite(high) else "none"


def arm_cells(comparison: Comparison) -> Cells:
    """Quality and failures of every arm, and the means of its controls where its runs trained them."""
    controls = {name: heading for name, heading in CONTROLS.items() if any(name in arm.alone for arm in comparison.arms)}
    headings = [*_headings(comparison), "runs", "failed", "mean", "IQM", "spread", *controls.values()]
    rows = []
    for arm in comparison.arms:
        numbers = [f"{arm.mean:.4g}", f"{arm.iqm:.4g}", f"{arm.spread:.2g}"]
        numbers += [f"{arm.alone[name]:.4g}" if name in arm.alone else "–" for name in controls]
        rows.append([*_begin(comparison, arm.block, arm.arm), str(arm.runs), str(arm.failed), *numbers])
    return Cells(headings, rows, len(_headings(comparison)))


def cost_cells(comparison: Comparison) -> Cells:
    """Cost and growth of every arm, means over its finished runs; no rows where nothing is known of either."""
    parts = [
        (part, name)
        for part in ("costs", "growth")
        for name in dict.fromkeys(name for arm in comparison.arms for name in getattr(arm, part))
    ]
    headings = [*_headings(comparison), *(HEADINGS.get(name, name) for _, name in parts)]
    rows = []
    for arm in comparison.arms:
        numbers = [number(getattr(arm, part).get(name)) for part, name in parts]
        rows.append([*_begin(comparison, arm.block, arm.arm), *numbers])
    return Cells(headings, rows if parts else [], len(_headings(comparison)))


def verdict_cells(comparison: Comparison) -> Cells:
    """One row a comparison; p-values and the interval's level are Holm's. It names the other arm where not all have the same."""
    several = len({row.reference for row in comparison.verdicts}) > 1
    begin = [*_headings(comparison), "against"] if several else _headings(comparison)
    headings = [*begin, "verdict", "better by", "interval", "p", "p equal", "P (better)"]
    rows = [
        [
            *_begin(comparison, row.block, row.arm),
            *([row.reference] if several else []),
            verdict_word(row),
            f"{row.difference:+.3g}",
            interval_text(row),
            f"{row.p_holm:.2g}",
            f"{row.p_equivalent:.2g}",
            number(row.probability),
        ]
        for row in comparison.verdicts
    ]
    return Cells(headings, rows, len(begin) + 1)


def overall_cells(comparison: Comparison) -> Cells:
    """The interquartile mean of every arm over all blocks, with its bootstrap interval."""
    rows = [[one.arm, f"{one.iqm:.4g}", f"{one.interval[0]:.4g} … {one.interval[1]:.4g}"] for one in comparison.overall]
    return Cells(["arm", "IQM", "95% bootstrap interval"], rows, 1)


def title(plan: Plan) -> str:
    """What the comparison is of, in a line."""
    return f"{plan.metric} ({'larger' if plan.direction == 'max' else 'smaller'} is better), against {plan.others}"
