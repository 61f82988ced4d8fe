"""A sweep in the MLflow store: the names of its tags and metrics, and the page that shows its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from esper.compare.results.comparison import Comparison, Judgement
from esper.compare.results.markdown import verdicts
from esper.compare.results.plan import Plan
from esper.compare.results.registered_plans import digest_of
from esper.compare.results.runs import costs_of
from esper.messages import Metrics
from esper.tracking.mlflow_run import LONGEST_TAG, NOTE_TAG, fitted, legal
from esper.tracking.run_page import MAIN

SWEEP, KIND, ARM, BLOCK, SEED = "esper.sweep", "esper.kind", "arm", "block", "seed"
PLAN, PLAN_DIGEST, TUNED, JOB_ERROR = "esper.plan", "esper.plan_digest", "esper.tuned", "esper.error"
TUNING, TRIAL = "tuning", "trial"  # KIND of a run that tuned an arm, and of one of a search
PIECE = 4_000  # characters of such a text in one tag; the store takes 5,000
VERDICT = "verdict"
CURVES = ["arm", "block", "run", "step", "value"]
MOST_CURVES = 1_000  # of more runs a page shows no curve that could be told from another


def split_text(text: str, name: str) -> dict[str, str]:
    """A long text as tags, so that a store without its files is enough; nothing for no text."""
    return {f"{name}.{i // PIECE}": text[i : i + PIECE] for i in range(0, len(text), PIECE)}


def join_text(tags: Mapping[str, str], name: str) -> str:
    """The text that :func:`split_text` cut; empty where there is none."""
    numbers = sorted(int(tag.removeprefix(f"{name}.")) for tag in tags if tag.startswith(f"{name}."))
    return "".join(tags[f"{name}.{number}"] for number in numbers)


def plan_tags(plan: str) -> dict[str, str]:
    """The plan's text and its SHA-256 as tags; nothing for no plan."""
    return split_text(plan, PLAN) | ({PLAN_DIGEST: digest_of(plan)} if plan else {})


def cost_values(summary: Mapping[str, Any]) -> Metrics:
    """The cost of a run, as last metrics of its MLflow run."""
    values = {f"final/cost/{name}": value for name, value in costs_of(summary).items()}
    return Metrics(tick=int(summary.get("ticks") or 0), values=values)


def verdict_description(comparison: Comparison) -> str:
    """The sentences, the verdicts as a table, and the notes, in Markdown."""
    return fitted("\n\n".join(verdicts(comparison)), LONGEST_TAG)


def verdict_tags(comparison: Comparison, plan: Plan) -> dict[str, str]:
    """The description, and ``verdict`` in a word an arm, so that a list of sweeps can be filtered by it."""
    words = [f"{_called(row)}: {row.verdict}" for row in comparison.verdicts]
    said = words[0].rpartition(": ")[2] if len(words) == 1 else "; ".join(words)
    return {NOTE_TAG: verdict_description(comparison), VERDICT: fitted(said, LONGEST_TAG), "reference": plan.reference}


def verdict_metrics(comparison: Comparison, plan: Plan) -> dict[str, float]:
    """``0_main/<arm> effect``, ``… interval_low``, ``… interval_high``, ``… p`` and ``… pairs``; the mean of every arm below ``arm/``.

    The effect is positive where the arm is better than the reference. Where nothing pairs the runs, both arms' runs are counted in the
    place of pairs. Numbers that do not exist are left out.
    """
    found: dict[str, float] = {}
    for row in comparison.verdicts:
        values = {"effect": row.difference, "interval_low": row.interval[0], "interval_high": row.interval[1], "p": _p(row)}
        found |= {
            f"{MAIN}/{_called(row)} {name}": value for name, value in (values | {"pairs": float(row.pairs or sum(row.counts))}).items()
        }
    for arm in comparison.arms:
        found[f"arm/{' '.join(filter(None, (arm.arm, arm.block)))}/{plan.metric}"] = arm.mean
    for one in comparison.tuned:
        found |= one.numbers()
    return {legal(name): value for name, value in found.items() if math.isfinite(value)}


def _called(row: Judgement) -> str:
    return " ".join(filter(None, (row.arm, row.block)))


def _p(row: Judgement) -> float:
    """The p-value, after Holm, that the verdict rests on."""
    return row.p_equivalent if row.verdict == "equivalent" else row.p_holm
