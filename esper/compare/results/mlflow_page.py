"""A sweep's own page in MLflow: the verdict as its description, tags and metrics."""

from __future__ import annotations

import math

from esper.compare.results.analysis import Comparison, Judged
from esper.compare.results.plan import Plan
from esper.tracking.mlflow_run import LONGEST_TAG, NOTE_TAG, fitted, legal
from esper.tracking.run_page import MAIN

VERDICT = "verdict"


def description(comparison: Comparison, plan: Plan) -> str:
    """The sentences, the verdicts as a table, and the notes, in Markdown."""
    parts = [f"**Exploratory:** {'; '.join(comparison.exploratory)}."] if comparison.exploratory else []
    parts += [f"**{line}**" for line in comparison.conclusion]
    parts.append("\n".join(f"- {row.sentence}" for row in comparison.verdicts))
    lines = [f"| arm | verdict | {plan.metric}, better by | interval | p | pairs |", "|---|---|---|---|---|---|"]
    for row in comparison.verdicts:
        low, high = row.interval
        cells = (_called(row), row.verdict, f"{row.difference:+.3g}", f"{low:+.2g} … {high:+.2g}", f"{_p(row):.2g}", row.pairs)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    parts.append("\n".join(lines))
    parts += [f"- {note}" for note in comparison.notes]
    return fitted("\n\n".join(parts), LONGEST_TAG)


def tags(comparison: Comparison, plan: Plan) -> dict[str, str]:
    """The description, and ``verdict`` in a word an arm, so that a list of sweeps can be filtered by it."""
    words = [f"{_called(row)}: {row.verdict}" for row in comparison.verdicts]
    said = words[0].rpartition(": ")[2] if len(words) == 1 else "; ".join(words)
    return {NOTE_TAG: description(comparison, plan), VERDICT: fitted(said, LONGEST_TAG), "reference": plan.reference}


def numbers(comparison: Comparison, plan: Plan) -> dict[str, float]:
    """``0_main/<arm> effect``, ``… interval_low``, ``… interval_high``, ``… p`` and ``… pairs``; the mean of every arm below ``arm/``.

    The effect is positive where the arm is better than the reference. Numbers that do not exist are left out.
    """
    found: dict[str, float] = {}
    for row in comparison.verdicts:
        values = {"effect": row.difference, "interval_low": row.interval[0], "interval_high": row.interval[1], "p": _p(row)}
        found |= {f"{MAIN}/{_called(row)} {name}": value for name, value in (values | {"pairs": float(row.pairs)}).items()}
    for arm in comparison.arms:
        found[f"arm/{' '.join(filter(None, (arm.arm, arm.block)))}/{plan.metric}"] = arm.mean
    for one in comparison.tuned:
        found |= one.numbers()
    return {legal(name): value for name, value in found.items() if math.isfinite(value)}


def _called(row: Judged) -> str:
    return " ".join(filter(None, (row.arm, row.block)))


def _p(row: Judged) -> float:
    """The p-value, after Holm, that the verdict rests on."""
    return row.p_equivalent if row.verdict == "equivalent" else row.p_holm
